"""Images and videos in a prompt: the placeholders, and as many tokens in their place as each one has.

A chat template writes one placeholder per image or video. Before the model reads the prompt, an image's becomes one
image token per token that the vision tower gives, and a video's, per temporal patch, its time in words and then the
frame between vision_start and vision_end, as `Qwen3VLProcessor` of transformers writes it:

    <|vision_start|> <|image_pad|> * n <|vision_end|>
    [ <0.2 seconds> <|vision_start|> <|video_pad|> * n <|vision_end|> ] * t

The outer pair of a video is the template's own. transformers 4.57, which the models came out with, and vLLM drop it;
transformers 5 leaves it there (`keep_outer`).

`expand_text` works on the prompt as text, `expand_tokens` on token ids. Both give the same ids, except where text
stands right before a video and the tokenizer joins its end with the "<" of the first time; then the reference is
`expand_text`.
"""

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from trimkv_export.errors import OptionError
from trimkv_export.runtime.mrope import Grid, count_tokens

__all__ = [
    "IMAGE_PAD",
    "IMAGE_PLACEHOLDER",
    "VIDEO_PAD",
    "VIDEO_PLACEHOLDER",
    "PromptIds",
    "VisualRun",
    "content_parts",
    "count_tokens",
    "expand_text",
    "expand_tokens",
    "place_visuals",
    "time_text",
    "visual_runs",
]

VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
IMAGE_PLACEHOLDER = VISION_START + IMAGE_PAD + VISION_END
VIDEO_PLACEHOLDER = VISION_START + VIDEO_PAD + VISION_END


@dataclass(frozen=True)
class PromptIds:
    """Token ids with a meaning to the model, and how many patches a side of the square has that is one token."""

    image: int
    video: int
    vision_start: int
    vision_end: int
    merge_size: int = 2


@dataclass(frozen=True)
class VisualRun:
    """Tokens start … start + length - 1 of a prompt, all of them image tokens, or all video tokens."""

    kind: Literal["image", "video"]
    start: int
    length: int


def place_visuals(text: str, *, images: int = 0, videos: int = 0) -> str:
    """`text` with placeholders for images, then for videos, before it."""
    return IMAGE_PLACEHOLDER * images + VIDEO_PLACEHOLDER * videos + text


def content_parts(text: str, *, images: int = 0, videos: int = 0) -> list[dict[str, str]]:
    """The `content` of a chat message of images, then videos, then `text`, for a chat template that knows parts."""
    return [{"type": "image"}] * images + [{"type": "video"}] * videos + [{"type": "text", "text": text}]


def time_text(seconds: float) -> str:
    """The words before a frame of a video, such as "<0.2 seconds>"."""
    return f"<{seconds:.1f} seconds>"


def expand_text(
    prompt: str,
    *,
    image_grids: Sequence[Grid] = (),
    video_grids: Sequence[Grid] = (),
    video_timestamps: Sequence[Sequence[float]] = (),
    merge_size: int = 2,
    keep_outer: bool = False,
) -> str:
    """The prompt with each placeholder written out; the i-th one belongs to the i-th image, or video.

    video_timestamps: [t] seconds of each video. keep_outer: see the module.
    Raises OptionError when the prompt has more or fewer placeholders than there are images or videos.
    """
    _check_times(video_grids, video_timestamps)
    _check_number(prompt.count(IMAGE_PAD), len(image_grids), "image")
    _check_number(prompt.count(VIDEO_PAD), len(video_grids), "video")
    images, videos = iter(image_grids), iter(zip(video_grids, video_timestamps, strict=True))

    def written_out(match: re.Match[str]) -> str:
        if match["image"]:
            return IMAGE_PAD * count_tokens(next(images), merge_size)
        (_, h, w), times = next(videos)
        frame = VISION_START + VIDEO_PAD * count_tokens((1, h, w), merge_size) + VISION_END
        return "".join(time_text(time) + frame for time in times)

    video = re.escape(VIDEO_PAD) if keep_outer else f"{re.escape(VIDEO_PLACEHOLDER)}|{re.escape(VIDEO_PAD)}"
    return re.sub(f"(?P<image>{re.escape(IMAGE_PAD)})|{video}", written_out, prompt)


def expand_tokens(
    tokens: Iterable[int],
    ids: PromptIds,
    *,
    image_grids: Sequence[Grid] = (),
    video_grids: Sequence[Grid] = (),
    video_timestamps: Sequence[Sequence[float]] = (),
    encode: Callable[[str], Sequence[int]] | None = None,
    keep_outer: bool = False,
) -> list[int]:
    """Token ids with each placeholder expanded; the i-th one belongs to the i-th image, or video.

    What is expanded already, with the right number of tokens, stays: an image token n times, or a video's t runs.
    video_timestamps: [t] seconds of each video. keep_outer: see the module.
    encode: ids of a text without special tokens around it; needed to expand videos, whose times are text.
    Raises OptionError when the prompt has more or fewer placeholders than there are images or videos, or a run of
    visual tokens of another length than its image or video has.
    """
    _check_times(video_grids, video_timestamps)
    try:
        tokens = [operator.index(token) for token in tokens]
    except TypeError as error:
        raise OptionError(f"token ids are whole numbers: {error}") from None
    runs = visual_runs(tokens, ids)
    image_runs = [run for run in runs if run.kind == "image"]
    _check_number(len(image_runs), len(image_grids), "image")
    edits = [
        _expand_image(run, grid, i, ids) for i, (run, grid) in enumerate(zip(image_runs, image_grids, strict=True))
    ]
    video_runs = [run for run in runs if run.kind == "video"]
    edits += _expand_videos(tokens, video_runs, video_grids, video_timestamps, ids, encode, keep_outer)
    result: list[int] = []
    done = 0
    for start, end, replacement in sorted(edits, key=lambda edit: edit[0]):
        result += tokens[done:start]
        result += replacement
        done = end
    return [*result, *tokens[done:]]


def visual_runs(tokens: Sequence[int], ids: PromptIds) -> list[VisualRun]:
    """The longest runs of equal visual tokens, in order; in an expanded prompt one per image and per video frame."""
    kinds: dict[int, Literal["image", "video"]] = {ids.image: "image", ids.video: "video"}
    runs: list[VisualRun] = []
    start = 0
    for place in range(1, len(tokens) + 1):
        if place == len(tokens) or tokens[place] != tokens[start]:
            if (kind := kinds.get(tokens[start])) is not None:
                runs.append(VisualRun(kind, start, place - start))
            start = place
    return runs


_Edit: TypeAlias = tuple[int, int, list[int]]  # tokens[start:end] become these


def _expand_image(run: VisualRun, grid: Grid, number: int, ids: PromptIds) -> _Edit:
    length = count_tokens(grid, ids.merge_size)
    if run.length not in (1, length):
        raise OptionError(
            f"image {number + 1} has {length} tokens, and its place in the prompt {run.length}; there must be as many, "
            "or a single one as placeholder"
        )
    return run.start, run.start + run.length, [ids.image] * length


def _expand_videos(
    tokens: list[int],
    runs: list[VisualRun],
    grids: Sequence[Grid],
    timestamps: Sequence[Sequence[float]],
    ids: PromptIds,
    encode: Callable[[str], Sequence[int]] | None,
    keep_outer: bool,
) -> list[_Edit]:
    edits: list[_Edit] = []
    place = 0  # in runs
    for number, (grid, times) in enumerate(zip(grids, timestamps, strict=True)):
        if place == len(runs):
            _check_number(number, len(grids), "video")
        length = count_tokens((1, *grid[1:]), ids.merge_size)
        if _is_placeholder(tokens, runs[place], length, times[0], encode):
            if encode is None:
                raise OptionError("a prompt with videos needs `encode`, since the times of their frames are text")
            frame = [ids.vision_start, *[ids.video] * length, ids.vision_end]
            span = _span(tokens, runs[place], ids, keep_outer)
            edits.append((*span, [token for time in times for token in (*encode(time_text(time)), *frame)]))
            place += 1
            continue
        expanded = [run.length for run in runs[place : place + len(times)]]
        if expanded != [length] * len(times):
            raise OptionError(
                f"video {number + 1} has {len(times)} x {length} tokens, and its place in the prompt "
                f"{' + '.join(map(str, expanded))}; there must be as many, or a single one as placeholder"
            )
        place += len(times)
    if place < len(runs):
        _check_number(len(grids) + len(runs) - place, len(grids), "video")
    return edits


def _is_placeholder(
    tokens: list[int], run: VisualRun, length: int, time: float, encode: Callable[[str], Sequence[int]] | None
) -> bool:
    """Whether a run stands for a video whose frames have `length` tokens, rather than being its first frame."""
    if run.length != 1 or length != 1 or encode is None:
        return run.length == 1 and length != 1
    word = list(encode(time_text(time)))  # a frame of one token is told apart by its time before vision_start
    end = run.start - 1
    return end < len(word) or tokens[end - len(word) : end] != word


def _span(tokens: Sequence[int], run: VisualRun, ids: PromptIds, keep_outer: bool) -> tuple[int, int]:
    """What of the prompt a video takes the place of: its placeholder, and unless they stay, the tokens around it."""
    start, end = run.start, run.start + 1
    if keep_outer:
        return start, end
    wrapped = start > 0 and tokens[start - 1] == ids.vision_start and [*tokens[end : end + 1]] == [ids.vision_end]
    return (start - 1, end + 1) if wrapped else (start, end)


def _check_number(placeholders: int, given: int, kind: str) -> None:
    if placeholders != given:
        raise OptionError(
            f"the prompt has {placeholders} {kind} placeholder{'' if placeholders == 1 else 's'} and {given} "
            f"{kind}{' was' if given == 1 else 's were'} given"
        )


def _check_times(grids: Sequence[Grid], timestamps: Sequence[Sequence[float]]) -> None:
    if len(grids) != len(timestamps):
        raise OptionError(f"{len(grids)} videos need as many lists of timestamps, got {len(timestamps)}")
    for number, (grid, times) in enumerate(zip(grids, timestamps, strict=True)):
        if len(times) != grid[0]:
            raise OptionError(f"video {number + 1} has {grid[0]} temporal patches and {len(times)} timestamps")
