"""Placeholders and their expansion, against the text that Qwen3VLProcessor of transformers writes."""

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.processing_utils import ProcessorMixin

from trimkv_export.errors import OptionError
from trimkv_export.runtime.chat import render_chat
from trimkv_export.runtime.mrope import Grid
from trimkv_export.runtime.visual_prompt import (
    IMAGE_PLACEHOLDER,
    VIDEO_PLACEHOLDER,
    PromptIds,
    VisualRun,
    content_parts,
    count_tokens,
    expand_text,
    expand_tokens,
    place_visuals,
    visual_runs,
)

IDS = PromptIds(image=901, video=902, vision_start=903, vision_end=904)
SPECIAL = {"<|image_pad|>": 901, "<|video_pad|>": 902, "<|vision_start|>": 903, "<|vision_end|>": 904}


def encode(text: str) -> list[int]:
    """One token per character, and one per special token."""
    parts = re.split("(" + "|".join(map(re.escape, SPECIAL)) + ")", text)
    return [token for part in parts for token in ([SPECIAL[part]] if part in SPECIAL else map(ord, part))]


def times_of(grid: Grid) -> list[float]:
    return [0.25 + 1.3 * t for t in range(grid[0])]


def reference(prompt: str, images: list[Grid], videos: list[Grid]) -> str:
    """What the processor of transformers makes of the prompt."""
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
    image_texts = [Qwen3VLProcessor.replace_image_token(processor, image_inputs, i) for i in range(len(images))]
    video_texts = [Qwen3VLProcessor.replace_video_token(processor, video_inputs, i) for i in range(len(videos))]
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


@given(pieces)
@settings(max_examples=300, deadline=None)
def test_text_and_tokens_as_in_the_reference(parts: list[Any]) -> None:
    placeholders = {"image": IMAGE_PLACEHOLDER, "video": VIDEO_PLACEHOLDER}
    prompt = "".join(part if isinstance(part, str) else placeholders[part[0]] for part in parts)
    found = [part for part in parts if not isinstance(part, str)]
    images = [grid for kind, grid in found if kind == "image"]
    videos = [grid for kind, grid in found if kind == "video"]
    times = [times_of(grid) for grid in videos]
    text = expand_text(prompt, image_grids=images, video_grids=videos, video_timestamps=times, keep_outer=True)
    assert text == reference(prompt, images, videos)
    arguments: Any = {"image_grids": images, "video_grids": videos, "video_timestamps": times, "encode": encode}
    arguments["keep_outer"] = True  # as transformers 5 has it
    tokens = expand_tokens(encode(prompt), IDS, **arguments)
    assert tokens == encode(text)
    assert expand_tokens(np.array(tokens, np.int64), IDS, **arguments) == tokens  # already expanded
    runs = visual_runs(tokens, IDS)
    want = [
        (kind, count_tokens((1, *grid[1:]))) for kind, grid in found for _ in range(grid[0] if kind == "video" else 1)
    ]
    assert [(run.kind, run.length) for run in runs] == want
    ids = {"image": 901, "video": 902}
    assert all(set(tokens[run.start : run.start + run.length]) == {ids[run.kind]} for run in runs)


def test_the_form_without_the_outer_pair() -> None:
    prompt = f"Compare {VIDEO_PLACEHOLDER} and <|video_pad|>{IMAGE_PLACEHOLDER}"
    arguments: Any = {
        "image_grids": [(1, 2, 4)],
        "video_grids": [(2, 2, 2), (1, 4, 2)],
        "video_timestamps": [[0.25, 1.5], [0.0]],
        "keep_outer": False,
    }
    start, end, video = "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"
    want = (
        f"Compare <0.2 seconds>{start}{video}{end}<1.5 seconds>{start}{video}{end} and "
        f"<0.0 seconds>{start}{video}{video}{end}{start}<|image_pad|><|image_pad|>{end}"
    )
    assert expand_text(prompt, **arguments) == want
    assert expand_tokens(encode(prompt), IDS, encode=encode, **arguments) == encode(want)


@pytest.mark.parametrize("merge_size", [1, 2, 4])
def test_merge_size(merge_size: int) -> None:
    ids = PromptIds(901, 902, 903, 904, merge_size)
    assert len(expand_tokens([1, 901, 2], ids, image_grids=[(1, 8, 12)])) == 2 + 96 // merge_size**2
    assert (
        expand_text("<|image_pad|>", image_grids=[(1, 8, 12)], merge_size=merge_size).count("<|") == 96 // merge_size**2
    )


def test_without_visuals() -> None:
    assert expand_tokens([], IDS) == []
    assert expand_tokens([5, 903, 904, 7], IDS) == [5, 903, 904, 7]
    assert expand_text("plain") == "plain"
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


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("name", COUNTS)
def test_wrong_counts(name: str, kind: str) -> None:
    placeholders, given, message = COUNTS[name]
    prompt = f"x <|vision_start|><|{kind}_pad|><|vision_end|>" * placeholders
    arguments: dict[str, Any] = {f"{kind}_grids": [(1, 4, 4)] * given}
    if kind == "video":
        arguments["video_timestamps"] = [[0.5]] * given
    with pytest.raises(OptionError, match=message.format(kind, kind)):
        expand_text(prompt, **arguments)
    with pytest.raises(OptionError, match=message.format(kind, kind)):
        expand_tokens(encode(prompt), IDS, encode=encode, **arguments)


def test_runs_of_another_length() -> None:
    with pytest.raises(OptionError, match="image 2 has 6 tokens, and its place in the prompt 5"):
        expand_tokens([901, 1, *[901] * 5], IDS, image_grids=[(1, 4, 4), (1, 4, 6)])
    with pytest.raises(OptionError, match=r"video 1 has 2 x 4 tokens, and its place in the prompt 4 \+ 3"):
        expand_tokens([*[902] * 4, 1, 902, 902, 902], IDS, video_grids=[(2, 4, 4)], video_timestamps=[[0, 1]])
    with pytest.raises(OptionError, match=r"video 1 has 3 x 4 tokens, and its place in the prompt 4"):
        expand_tokens([902] * 4, IDS, video_grids=[(3, 4, 4)], video_timestamps=[[0, 1, 2]])


def test_videos_need_times() -> None:
    with pytest.raises(OptionError, match="needs `encode`"):
        expand_tokens([902], IDS, video_grids=[(1, 4, 4)], video_timestamps=[[0.5]])
    with pytest.raises(OptionError, match="1 videos need as many lists of timestamps, got 0"):
        expand_tokens([902], IDS, video_grids=[(1, 4, 4)])
    with pytest.raises(OptionError, match="video 1 has 2 temporal patches and 1 timestamps"):
        expand_text(VIDEO_PLACEHOLDER, video_grids=[(2, 4, 4)], video_timestamps=[[0.5]])
    # A prompt that is expanded already needs no encode.
    assert expand_tokens([902] * 4, IDS, video_grids=[(1, 4, 4)], video_timestamps=[[0.5]]) == [902] * 4


def test_placing() -> None:
    assert place_visuals("What?", images=2, videos=1) == IMAGE_PLACEHOLDER * 2 + VIDEO_PLACEHOLDER + "What?"
    template = (
        "{% for part in messages[0].content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}"
    )
    parts = content_parts("What?", images=1, videos=1)
    text = render_chat(template, [{"role": "user", "content": parts}])
    assert text == place_visuals("What?", images=1, videos=1)
