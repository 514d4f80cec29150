"""Images and videos in a prompt: each placeholder becomes as many tokens as its image or video has.

A chat template writes one placeholder per image or video. Before the model reads the prompt, an image's becomes one
image token per token that the vision tower gives, and so does a video's in models that need no timestamps. In those
that have them, it becomes, per temporal patch, its time in words and then the frame between vision_start and
vision_end, as `Qwen3VLProcessor` of transformers writes it:

    [ <0.2 seconds> <|vision_start|> <|video_pad|> * n <|vision_end|> ] * t

The pair around a video's placeholder is the template's own. With timestamps, transformers 4.57, which the models came
out with, and vLLM drop it; transformers 5 leaves it there (`keep_outer`).

The ids are those of the reference, which expands the text, except where text stands right before a video and the
tokenizer joins its end with the "<" of the first time.
"""

import itertools
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from trimkv_export.errors import OptionError

__all__ = [
    "PromptIds",
    "VideoTokens",
    "VisualRun",
    "content_parts",
    "enclose_placeholders",
    "expand_tokens",
    "time_text",
    "visual_runs",
]


# What to do about a placeholder that is meant as text.
LITERALLY = "; where text is meant, take it literally (--literal)"


@dataclass(frozen=True)
class PromptIds:
    """Token ids with a meaning to the model; None where it has no such token."""

    image: int
    video: int | None = None
    vision_start: int | None = None
    vision_end: int | None = None


@dataclass(frozen=True)
class VideoTokens:
    """How a video is written.

    Attributes:
        length: tokens of a run.
        timestamps: seconds, each with a run of its own; None: the video is one run.
    """

    length: int
    timestamps: Sequence[float] | None = None


@dataclass(frozen=True)
class VisualRun:
    """Tokens start … start + length - 1 of a prompt, all of them image tokens, or all video tokens."""

    kind: Literal["image", "video"]
    start: int
    length: int


def content_parts(text: str, *, images: int = 0, videos: int = 0) -> list[dict[str, str]]:
    """The `content` of a chat message of images, then videos, then `text`, for a chat template that knows parts."""
    return [{"type": "image"}] * images + [{"type": "video"}] * videos + [{"type": "text", "text": text}]


def enclose_placeholders(text: str, marks: Iterable[str], before: str, after: str) -> str:
    """A text whose placeholders have around them what the model reads around every picture, as its chat template does.

    A placeholder that stands alone gets both; one that has a side already gets the other. Placeholders that follow each
    other directly are several pictures, each with its own, unless they have a side: then they stay together.

    Args:
        text: of a user.
        marks: the texts of the placeholders.
        before: the text of vision_start; "" if the model has none.
        after: the text of vision_end.
    """
    if not (before or after):
        return text
    start, end = re.escape(before), re.escape(after)

    def enclosed(found: re.Match[str]) -> str:
        begun, run, ended = found["begun"], found["run"], found["ended"]
        if begun or ended:
            return before + run + after
        return (before + found["mark"] + after) * (len(run) // len(found["mark"]))

    for mark in map(re.escape, marks):
        text = re.sub(f"(?P<begun>{start})?(?P<run>(?P<mark>{mark})(?:{mark})*)(?P<ended>{end})?", enclosed, text)
    return text


def time_text(seconds: float) -> str:
    """The words before a frame of a video, such as "<0.2 seconds>"."""
    return f"<{seconds:.1f} seconds>"


def expand_tokens(
    tokens: Iterable[int],
    ids: PromptIds,
    *,
    images: Sequence[int] = (),
    videos: Sequence[VideoTokens] = (),
    encode: Callable[[str], Sequence[int]] | None = None,
    keep_outer: bool = False,
) -> list[int]:
    """Token ids with each placeholder expanded; the i-th one belongs to the i-th image, or video.

    What is expanded already, with the right number of tokens, stays: a picture's run, or a video's t runs. Pictures may
    stand side by side, if all of them are expanded there or all are in the prompt.

    Args:
        tokens: of the prompt.
        ids: of the tokens with a meaning to the model.
        images: how many tokens each has.
        videos: all of them with timestamps, or none.
        encode: ids of a text without special tokens around it; needed for timestamps, which are text.
        keep_outer: leave vision_start and vision_end around a video's placeholder, as transformers 5 does.

    Raises:
        OptionError: the prompt has more or fewer placeholders than there are images or videos, or a run of visual
            tokens of another length than its image or video has.
    """
    try:
        tokens = [operator.index(token) for token in tokens]
    except TypeError as error:
        raise OptionError(f"token ids are whole numbers: {error}") from None
    runs = visual_runs(tokens, ids)
    video_runs = [run for run in runs if run.kind == "video"]
    edits = _expand_runs([run for run in runs if run.kind == "image"], images, "image", ids.image)
    if ids.video is None:
        _check_number(0, len(videos), "video")
    elif any(video.timestamps is not None for video in videos):
        edits += _expand_frames(tokens, video_runs, videos, ids, encode, keep_outer)
    else:
        edits += _expand_runs(video_runs, [video.length for video in videos], "video", ids.video)
    result: list[int] = []
    done = 0
    for start, end, replacement in sorted(edits, key=lambda edit: edit[0]):
        result += tokens[done:start]
        result += replacement
        done = end
    return [*result, *tokens[done:]]


def visual_runs(tokens: Sequence[int], ids: PromptIds) -> list[VisualRun]:
    """The longest runs of equal visual tokens, in order."""
    kinds: dict[int | None, Literal["image", "video"]] = {ids.video: "video", ids.image: "image"}
    runs: list[VisualRun] = []
    start = 0
    for place in range(1, len(tokens) + 1):
        if place == len(tokens) or tokens[place] != tokens[start]:
            if (kind := kinds.get(tokens[start])) is not None:
                runs.append(VisualRun(kind, start, place - start))
            start = place
    return runs


_Edit: TypeAlias = tuple[int, int, list[int]]  # tokens[start:end] become these


def _expand_runs(
    runs: Sequence[VisualRun], lengths: Sequence[int], kind: Literal["image", "video"], token: int
) -> list[_Edit]:
    """Edits for pictures that are one run of tokens each."""
    places: list[tuple[int, int]] = []  # start and length
    single = sum(run.length for run in runs) == len(lengths)  # placeholders only, perhaps side by side
    for run in runs:
        rest = lengths[len(places) :]
        ends = list(itertools.accumulate(rest))
        parts: Sequence[int] = [run.length]
        if single:
            parts = [1] * run.length
        elif run.length in ends:  # one picture that is expanded, or several
            parts = rest[: ends.index(run.length) + 1]
        starts = itertools.accumulate(parts[:-1], initial=run.start)
        places += zip(starts, parts, strict=True)
    _check_number(len(places), len(lengths), kind)
    for number, ((_, found), length) in enumerate(zip(places, lengths, strict=True)):
        if found not in (1, length):
            raise OptionError(
                f"{kind} {number + 1} has {length} tokens, and its place in the prompt {found}; there must be as many, "
                "or a single one as placeholder"
            )
    return [(at, at + found, [token] * length) for (at, found), length in zip(places, lengths, strict=True)]


def _expand_frames(
    tokens: list[int],
    runs: list[VisualRun],
    videos: Sequence[VideoTokens],
    ids: PromptIds,
    encode: Callable[[str], Sequence[int]] | None,
    keep_outer: bool,
) -> list[_Edit]:
    """Edits for videos with timestamps."""
    edits: list[_Edit] = []
    place = 0  # in runs
    before, after = ([] if token is None else [token] for token in (ids.vision_start, ids.vision_end))
    for number, video in enumerate(videos):
        if place == len(runs):
            _check_number(number, len(videos), "video")
        length, times = video.length, video.timestamps or ()
        if _is_placeholder(tokens, runs[place], length, times[0], encode):
            if encode is None:
                raise OptionError("a prompt with videos needs `encode`, since the times of their frames are text")
            frame = [*before, *[tokens[runs[place].start]] * length, *after]
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
        _check_number(len(videos) + len(runs) - place, len(videos), "video")
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
    """The part of the prompt that a video replaces: its placeholder and, unless they stay, the tokens around it."""
    start, end = run.start, run.start + 1
    if keep_outer:
        return start, end
    wrapped = start > 0 and tokens[start - 1] == ids.vision_start and [*tokens[end : end + 1]] == [ids.vision_end]
    return (start - 1, end + 1) if wrapped else (start, end)


def _check_number(placeholders: int, given: int, kind: str) -> None:
    if placeholders != given:
        raise OptionError(
            f"the prompt has {placeholders} {kind} placeholder{'' if placeholders == 1 else 's'} and {given} "
            f"{kind}{' was' if given == 1 else 's were'} given{LITERALLY if placeholders > given else ''}"
        )
