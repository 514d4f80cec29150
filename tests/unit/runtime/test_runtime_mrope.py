"""M-RoPE positions, against transformers' get_rope_index."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from trimkv_export.errors import OptionError
from trimkv_export.runtime.mrope import MRopePositions, frame_grids

TEXT, IMAGE, VIDEO = 0, 1, 2
Grids = list[tuple[int, int, int]]


@pytest.fixture(scope="module", params=[1, 2, 3])
def reference(request: pytest.FixtureRequest) -> Any:
    """A Qwen3VLModel without weights that merges 1, 2 or 3 patches per side."""
    text = {
        "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "head_dim": 8,
        "num_key_value_heads": 2, "vocab_size": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [], "spatial_merge_size": request.param,
    }  # fmt: skip
    with torch.device("meta"):
        return Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision))


def conversation(rng: np.random.Generator, merge: int) -> tuple[list[int], Grids, Grids, Grids]:
    """Token types, the grids of images, those of videos, and those of images and frames in order."""
    types: list[int] = []
    images: Grids = []
    videos: Grids = []
    order: Grids = []

    def text(least: int) -> None:
        types.extend([TEXT] * int(rng.integers(least, 6)))

    text(0)
    for _ in range(rng.integers(1, 6)):
        height, width = (int(size) * merge for size in rng.integers(1, 6, 2))
        tokens = height * width // merge**2
        if rng.random() < 0.5:
            images.append((1, height, width))
            order.append(images[-1])
            types.extend([IMAGE] * tokens)
            text(1)
            continue
        videos.append((int(rng.integers(1, 5)), height, width))
        order.extend(frame_grids(videos[-1]))
        for _ in range(videos[-1][0]):
            types.extend([VIDEO] * tokens)
            text(1)
    return types, images, videos, order


def expected_positions(reference: Any, types: list[int], images: Grids, videos: Grids) -> NDArray[np.int64]:
    found, _ = reference.get_rope_index(
        torch.zeros(1, len(types), dtype=torch.int64),
        torch.tensor([types], dtype=torch.int32),
        torch.tensor(images) if images else None,
        torch.tensor(videos) if videos else None,
    )
    positions: NDArray[np.int64] = found[:, 0].numpy()
    return positions


@pytest.mark.parametrize("seed", range(12))
def test_positions_are_those_of_transformers_wherever_steps_are_cut(reference: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    merge = reference.config.vision_config.spatial_merge_size
    types, images, videos, order = conversation(rng, merge)
    expected = expected_positions(reference, types, images, videos)
    visual = np.array(types) != TEXT
    at_once = MRopePositions(merge)
    at_once.check(visual, order)
    at_once.expect(order)
    assert at_once.visual_tokens_left == visual.sum()
    np.testing.assert_array_equal(at_once.step(visual), expected)
    for most in (1, 4, 9):
        in_steps, start = MRopePositions(merge), 0
        in_steps.expect(order[:1])
        in_steps.expect(order[1:])
        while start < len(types):
            part = visual[start : start + int(rng.integers(1, most + 1))]
            np.testing.assert_array_equal(in_steps.step(part), expected[:, start : start + len(part)])
            start += len(part)
        assert (in_steps.next_position, in_steps.visual_tokens_left) == (at_once.next_position, 0)


@pytest.mark.parametrize("seed", range(4))
def test_generation_goes_on_where_transformers_does(reference: Any, seed: int) -> None:
    merge = reference.config.vision_config.spatial_merge_size
    types, images, videos, order = conversation(np.random.default_rng(100 + seed), merge)
    _, delta = reference.get_rope_index(
        torch.zeros(1, len(types), dtype=torch.int64),
        torch.tensor([types], dtype=torch.int32),
        torch.tensor(images) if images else None,
        torch.tensor(videos) if videos else None,
    )
    positions = MRopePositions(merge)
    positions.expect(order)
    positions.step(np.array(types) != TEXT)
    assert positions.next_position == len(types) + int(delta)


def test_an_image_of_several_time_steps(reference: Any) -> None:
    merge = reference.config.vision_config.spatial_merge_size
    grid = (3, 2 * merge, 4 * merge)
    types = [TEXT] * 2 + [IMAGE] * 24 + [TEXT] * 3
    expected = expected_positions(reference, types, [grid], [])
    positions = MRopePositions(merge)
    positions.expect([grid])
    np.testing.assert_array_equal(positions.step(np.array(types) != TEXT), expected)


def test_text_counts_on() -> None:
    positions = MRopePositions(2)
    for start, count in ((0, 5), (5, 1), (6, 0), (6, 3)):
        expected = np.broadcast_to(np.arange(start, start + count), (3, count))
        found = positions.step(np.zeros(count, np.bool_))
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == np.int64
    assert positions.next_position == 9


def test_one_integer_is_the_state_between_images() -> None:
    visual = np.array([False, True, True, True, True, True, True, False])
    first = MRopePositions(2)
    first.expect([(1, 4, 6)])
    first.step(visual)
    assert (first.next_position, first.visual_tokens_left) == (1 + 3 + 1, 0)
    second = MRopePositions(2, first.next_position)
    for positions in (first, second):
        positions.expect([(1, 6, 4)])
    np.testing.assert_array_equal(second.step(visual), first.step(visual))
    first.reset()
    assert first.next_position == 0
    np.testing.assert_array_equal(first.step(visual[:1]), [[0]] * 3)


def test_images_side_by_side() -> None:
    positions = MRopePositions(2)
    positions.expect([(1, 2, 4), (1, 2, 2)])
    np.testing.assert_array_equal(positions.step(np.ones(3, np.bool_)), [[0, 0, 2], [0, 0, 2], [0, 1, 2]])


def test_a_video_is_its_frames() -> None:
    assert frame_grids(np.array([3, 4, 8])) == [(1, 4, 8)] * 3
    with pytest.raises(OptionError, match=r"a video grid is \(t, h, w\).* got \(4, 8\)"):
        frame_grids((4, 8))


@pytest.mark.parametrize(
    ("visual", "grids", "said"),
    [
        ([0, 1, 0], [(1, 4, 4)], "token 2 of this step is text, but the image before it has 3 more tokens"),
        ([0, 1], [], "token 1 of this step stands for an image that was not given"),
        ([1, 1], [(1, 2, 2)], "token 1 of this step stands for an image that was not given"),
        ([1], [(1, 2, 3)], r"multiples of 2; got \(1, 2, 3\)"),
        ([1], [(0, 2, 2)], r"got \(0, 2, 2\)"),
        ([1], [(2, 2)], r"got \(2, 2\)"),
    ],
)
def test_what_does_not_fit_changes_nothing(visual: list[int], grids: list[Any], said: str) -> None:
    positions = MRopePositions(2, 7)
    with pytest.raises(OptionError, match=said):
        positions.check(np.array(visual, np.bool_), grids)
    assert (positions.next_position, positions.visual_tokens_left) == (7, 0)
    np.testing.assert_array_equal(positions.step(np.zeros(1, np.bool_)), [[7]] * 3)


def test_text_within_an_image_of_an_earlier_step() -> None:
    positions = MRopePositions(1)
    positions.expect([(1, 1, 3)])
    positions.step(np.ones(2, np.bool_))
    assert positions.visual_tokens_left == 1
    with pytest.raises(OptionError, match="token 0 of this step is text, but the image before it has 1 more"):
        positions.step(np.zeros(1, np.bool_))
    np.testing.assert_array_equal(positions.step(np.array([True, False])), [[0, 3], [0, 3], [2, 3]])
