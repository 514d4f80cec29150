"""Placeholders and their expansion, against the text that the processors of transformers write."""

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.processing_utils import ProcessorMixin

from trimkv_export.errors import OptionError
from trimkv_export.vision.positions import Grid
from trimkv_export.vision.prompt import (
    PromptIds,
    VideoTokens,
    VisualRun,
    content_parts,
    enclose_placeholders,
    expand_tokens,
    visual_runs,
)

IDS = PromptIds(image=901, video=902, vision_start=903, vision_end=904)
SPECIAL = {"<|image_pad|>": 901, "<|video_pad|>": 902, "<|vision_start|>": 903, "<|vision_end|>": 904, "<image>": 905}
IMAGE_PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO_PLACEHOLDER = "<|vision_start|><|video_pad|><|vision_end|>"


def encode(text: str) -> list[int]:
    """One token per character, and one per special token."""
    parts = re.split("(" + "|".join(map(re.escape, SPECIAL)) + ")", text)
    return [token for part in parts for token in ([SPECIAL[part]] if part in SPECIAL else map(ord, part))]


def count(grid: Grid) -> int:
    return int(np.prod(grid)) // 4


def times_of(grid: Grid) -> list[float]:
    return [0.25 + 1.3 * t for t in range(grid[0])]


def reference(kind: Any, prompt: str, images: list[Grid], videos: list[Grid]) -> str:
    """What a processor of transformers makes of the prompt."""
    processor: Any = SimpleNamespace(
        image_processor=SimpleNamespace(merge_size=2),
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        image_token="<|image_pad|>",  # noqa: S106
        video_token="<|video_pad|>",  # noqa: S106
        vision_start_token="<|vision_start|>",  # noqa: S106
        vision_end_token="<|vision_end|>",  # noqa: S106
        all_special_multimodal_tokens=["<|image_pad|>", "<|video_pad|>"],
        _calculate_timestamps=lambda indices, fps, size: indices,
    )
    metadata = [SimpleNamespace(fps=1.0, frames_indices=times_of(grid)) for grid in videos]
    image_inputs = {"image_grid_thw": np.array(images)}
    video_inputs = {"video_grid_thw": np.array(videos), "video_metadata": metadata}
    image_texts = [kind.replace_image_token(processor, image_inputs, i) for i in range(len(images))]
    video_texts = [kind.replace_video_token(processor, video_inputs, i) for i in range(len(videos))]
    texts, _ = ProcessorMixin.get_text_with_replacements(processor, [prompt], image_texts, video_texts)
    return str(texts[0])


grids = st.tuples(st.integers(1, 4), st.integers(1, 3).map(lambda n: 2 * n), st.integers(1, 3).map(lambda n: 2 * n))
pieces = st.lists(
    st.one_of(
        st.text("ab <0.2sec>\n", max_size=5),
        st.tuples(st.just("image"), grids.map(lambda grid: (1, *grid[1:]))),
        st.tuples(st.just("video"), grids),
    ),
    max_size=8,
)


@given(pieces, st.sampled_from([Qwen3VLProcessor, Qwen2_5_VLProcessor]))
@settings(max_examples=300)
def test_tokens_are_those_of_the_reference(parts: list[Any], kind: Any) -> None:
    timed = kind is Qwen3VLProcessor
    placeholders = {"image": IMAGE_PLACEHOLDER, "video": VIDEO_PLACEHOLDER}
    prompt = "".join(part if isinstance(part, str) else placeholders[part[0]] for part in parts)
    found = [part for part in parts if not isinstance(part, str)]
    images = [grid for kind, grid in found if kind == "image"]
    videos = [grid for kind, grid in found if kind == "video"]
    text = reference(kind, prompt, images, videos)
    arguments: Any = {"images": list(map(count, images)), "encode": encode, "keep_outer": True}  # as transformers 5
    arguments["videos"] = [
        VideoTokens(count((1, *grid[1:])), times_of(grid)) if timed else VideoTokens(count(grid)) for grid in videos
    ]
    tokens = expand_tokens(encode(prompt), IDS, **arguments)
    assert tokens == encode(text)
    assert expand_tokens(np.array(tokens, np.int64), IDS, **arguments) == tokens  # already expanded
    want = []
    for name, (frames, *sides) in found:
        runs = frames if timed else 1
        want += [(name, count((frames // runs, *sides)))] * runs
    runs = visual_runs(tokens, IDS)
    assert [(run.kind, run.length) for run in runs] == want
    ids = {"image": 901, "video": 902}
    assert all(set(tokens[run.start : run.start + run.length]) == {ids[run.kind]} for run in runs)


@given(st.lists(st.sampled_from(["a", " ", "<image>"]), max_size=9), st.integers(1, 5))
@settings(max_examples=200)
def test_images_side_by_side(parts: list[str], side: int) -> None:
    """Nothing encloses them."""
    prompt, given = "".join(parts), parts.count("<image>")
    processor: Any = SimpleNamespace(
        patch_size=14,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        image_token="<image>",  # noqa: S106
        all_special_multimodal_tokens=["<image>"],
    )
    pixels = {"pixel_values": np.zeros((given, 3, 14 * side, 14 * side))}
    texts = [LlavaProcessor.replace_image_token(processor, pixels, i) for i in range(given)]
    want, _ = ProcessorMixin.get_text_with_replacements(processor, [prompt], texts)
    ids = PromptIds(image=905)
    tokens = expand_tokens(encode(prompt), ids, images=[side**2] * given)
    assert tokens == encode(str(want[0]))
    assert expand_tokens(tokens, ids, images=[side**2] * given) == tokens


def test_the_form_without_the_outer_pair() -> None:
    prompt = f"Compare {VIDEO_PLACEHOLDER} and <|video_pad|>{IMAGE_PLACEHOLDER}"
    start, end, video = "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"
    want = (
        f"Compare <0.2 seconds>{start}{video}{end}<1.5 seconds>{start}{video}{end} and "
        f"<0.0 seconds>{start}{video}{video}{end}{start}<|image_pad|><|image_pad|>{end}"
    )
    videos = [VideoTokens(1, [0.25, 1.5]), VideoTokens(2, [0.0])]
    assert expand_tokens(encode(prompt), IDS, images=[2], videos=videos, encode=encode) == encode(want)


def test_without_visuals() -> None:
    assert expand_tokens([], IDS) == []
    assert expand_tokens([5, 903, 904, 7], IDS) == [5, 903, 904, 7]
    assert visual_runs([], IDS) == []
    assert visual_runs([901, 901, 902, 5, 902], IDS) == [
        VisualRun("image", 0, 2),
        VisualRun("video", 2, 1),
        VisualRun("video", 4, 1),
    ]


COUNTS = {
    "too few": (1, 2, "the prompt has 1 {} placeholder and 2 {}s were given"),
    "too many": (3, 1, "the prompt has 3 {} placeholders and 1 {} was given"),
    "none": (0, 1, "the prompt has 0 {} placeholders and 1 {} was given"),
    "none given": (2, 0, "the prompt has 2 {} placeholders and 0 {}s were given"),
}


@pytest.mark.parametrize("kind", ["image", "video", "timed video"])
@pytest.mark.parametrize("name", COUNTS)
def test_wrong_counts(name: str, kind: str) -> None:
    placeholders, given, message = COUNTS[name]
    noun = kind.removeprefix("timed ")
    prompt = f"x <|vision_start|><|{noun}_pad|><|vision_end|>" * placeholders
    pictures: dict[str, Any] = {
        "image": {"images": [4] * given},
        "video": {"videos": [VideoTokens(4)] * given},
        "timed video": {"videos": [VideoTokens(4, [0.5])] * given},
    }
    with pytest.raises(OptionError, match=message.format(noun, noun)):
        expand_tokens(encode(prompt), IDS, encode=encode, **pictures[kind])


def test_videos_where_the_model_takes_none() -> None:
    with pytest.raises(OptionError, match="0 video placeholders and 1 video was given"):
        expand_tokens([902], PromptIds(image=901), videos=[VideoTokens(1)])


def test_runs_of_another_length() -> None:
    with pytest.raises(OptionError, match="image 2 has 6 tokens, and its place in the prompt 5"):
        expand_tokens([901, 1, *[901] * 5], IDS, images=[4, 6])
    with pytest.raises(OptionError, match="image 1 has 4 tokens, and its place in the prompt 9"):
        expand_tokens([901] * 9, IDS, images=[4])
    with pytest.raises(OptionError, match="video 1 has 8 tokens, and its place in the prompt 7"):
        expand_tokens([902] * 7, IDS, videos=[VideoTokens(8)])
    with pytest.raises(OptionError, match=r"video 1 has 2 x 4 tokens, and its place in the prompt 4 \+ 3"):
        expand_tokens([*[902] * 4, 1, 902, 902, 902], IDS, videos=[VideoTokens(4, [0, 1])])
    with pytest.raises(OptionError, match=r"video 1 has 3 x 4 tokens, and its place in the prompt 4"):
        expand_tokens([902] * 4, IDS, videos=[VideoTokens(4, [0, 1, 2])])


def test_times_need_encode() -> None:
    with pytest.raises(OptionError, match="needs `encode`"):
        expand_tokens([902], IDS, videos=[VideoTokens(4, [0.5])])
    # A prompt that is expanded already needs none, nor does one without times.
    assert expand_tokens([902] * 4, IDS, videos=[VideoTokens(4, [0.5])]) == [902] * 4
    assert expand_tokens([902], IDS, videos=[VideoTokens(4)]) == [902] * 4


def test_content_parts() -> None:
    text = {"type": "text", "text": "What?"}
    assert content_parts("What?", images=2, videos=1) == [{"type": "image"}] * 2 + [{"type": "video"}, text]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("P what?", "SPE what?"),
        ("What is in P and SPE?", "What is in SPE and SPE?"),
        ("PP", "SPESPE"),
        ("SP?", "SPE?"),
        ("PE?", "SPE?"),
        ("SPPPE", "SPPPE"),  # expanded
        ("PQ", "SPESQE"),
        ("no picture", "no picture"),
        ("", ""),
    ],
)
def test_placeholders_are_enclosed(text: str, expected: str) -> None:
    """As the model's chat template writes them."""
    marks = {"S": "<|vision_start|>", "E": "<|vision_end|>", "P": "<|image_pad|>", "Q": "<|video_pad|>"}
    written, wanted = ("".join(marks.get(letter, letter) for letter in each) for each in (text, expected))
    assert enclose_placeholders(written, [marks["P"], marks["Q"]], marks["S"], marks["E"]) == wanted
    assert enclose_placeholders(wanted, [marks["P"], marks["Q"]], marks["S"], marks["E"]) == wanted
    assert enclose_placeholders(written, [marks["P"]], "", "") == written
