"""Positions of text, images and videos, against transformers' get_rope_index."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import Qwen2_5_VLConfig, Qwen3VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel
from visual_prompts import vision_info

from trimkv_export.errors import OptionError
from trimkv_export.package import VisionInfo
from trimkv_export.vision.positions import Block, Grid, MRopePositions, picture_blocks

TEXT, IMAGE, VIDEO = 0, 1, 2
TEXT_CONFIG = {
    "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "head_dim": 8,
    "num_key_value_heads": 2, "vocab_size": 32,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
}  # fmt: skip
VISION_CONFIG = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}


@pytest.fixture(scope="module", params=[1, 2, 3])
def reference(request: pytest.FixtureRequest) -> Any:
    """A Qwen3VLModel without weights that merges 1, 2 or 3 patches per side: videos have timestamps."""
    own = {"num_position_embeddings": 16, "deepstack_visual_indexes": [], "spatial_merge_size": request.param}
    with torch.device("meta"):
        return Qwen3VLModel(Qwen3VLConfig(text_config=TEXT_CONFIG, vision_config=VISION_CONFIG | own))


@pytest.fixture(scope="module", params=[(1, 2), (2, 2), (2, 3)])
def timed(request: pytest.FixtureRequest) -> Any:
    """A Qwen2_5_VLModel without weights, by merge size and positions in a second: videos are runs of tokens."""
    merge, tokens_per_second = request.param
    own = {"spatial_merge_size": merge, "tokens_per_second": tokens_per_second}
    with torch.device("meta"):
        return Qwen2_5_VLModel(Qwen2_5_VLConfig(text_config=TEXT_CONFIG, vision_config=VISION_CONFIG | own))


def info_of(model: Any) -> VisionInfo:
    vision = model.config.vision_config
    pace = getattr(vision, "tokens_per_second", None)
    return vision_info(spatial_merge_size=vision.spatial_merge_size, tokens_per_second=pace)


class Prompt:
    """Token types, and grids of images and videos; blocks: of all in order; seconds: of a patch of each video."""

    def __init__(self, info: VisionInfo) -> None:
        self.info = info
        self.types: list[int] = []
        self.images: list[Grid] = []
        self.videos: list[Grid] = []
        self.blocks: list[Block] = []
        self.seconds: list[float] = []

    @property
    def visual(self) -> NDArray[np.bool_]:
        return np.not_equal(self.types, TEXT)

    def index(self, model: Any) -> tuple[NDArray[np.int64], int]:
        """Positions and delta of transformers."""
        found, delta = model.get_rope_index(
            torch.zeros(1, len(self.types), dtype=torch.int64),
            torch.tensor([self.types], dtype=torch.int32),
            torch.tensor(self.images) if self.images else None,
            torch.tensor(self.videos) if self.videos else None,
            **({"second_per_grid_ts": torch.tensor(self.seconds)} if self.seconds else {}),
        )
        return found[:, 0].numpy(), int(delta)

    def add_text(self, count: int) -> None:
        self.types += [TEXT] * count

    def add_image(self, rows: int, columns: int) -> None:
        self.images.append((1, rows * self.info.spatial_merge_size, columns * self.info.spatial_merge_size))
        self.blocks += picture_blocks(self.info, self.images[-1])
        self.types += [IMAGE] * (rows * columns)

    def add_video(self, frames: int, rows: int, columns: int) -> None:
        """With a timestamp before each frame but the first."""
        self.videos.append((frames, rows * self.info.spatial_merge_size, columns * self.info.spatial_merge_size))
        self.blocks += picture_blocks(self.info, self.videos[-1])
        for frame in range(frames):
            self.add_text(min(frame, 2))
            self.types += [VIDEO] * (rows * columns)

    def add_run(self, frames: int, rows: int, columns: int, seconds: float) -> None:
        """A video without timestamps."""
        self.videos.append((frames, rows * self.info.spatial_merge_size, columns * self.info.spatial_merge_size))
        self.seconds.append(seconds)
        self.blocks += picture_blocks(self.info, self.videos[-1], second_per_grid=seconds)
        self.types += [VIDEO] * (frames * rows * columns)


def conversation(rng: np.random.Generator, model: Any) -> Prompt:
    """Random text, images and videos; without timestamps, these last no longer than they are wide or high."""
    prompt = Prompt(info_of(model))
    prompt.add_text(int(rng.integers(0, 6)))
    for _ in range(rng.integers(1, 6)):
        frames, rows, columns = (int(size) for size in rng.integers(1, 6, 3))
        if rng.random() < 0.5:
            prompt.add_image(rows, columns)
        elif (pace := prompt.info.tokens_per_second) is None:
            prompt.add_video(frames, rows, columns)
        else:
            most = max(rows, columns) / max(1, frames - 1) / pace
            prompt.add_run(frames, rows, columns, float(rng.uniform(0, 0.999 * most)))
        prompt.add_text(int(rng.integers(1, 6)))
    return prompt


def check_any_steps(prompt: Prompt, expected: NDArray[np.int64], rng: np.random.Generator) -> None:
    at_once = MRopePositions()
    at_once.check(prompt.visual, prompt.blocks)
    at_once.expect(prompt.blocks)
    assert at_once.visual_tokens_left == prompt.visual.sum()
    np.testing.assert_array_equal(at_once.step(prompt.visual), expected)
    for most in (1, 4, 9):
        in_steps, start = MRopePositions(), 0
        in_steps.expect(prompt.blocks[:1])
        in_steps.expect(prompt.blocks[1:])
        while start < len(prompt.types):
            part = prompt.visual[start : start + int(rng.integers(1, most + 1))]
            np.testing.assert_array_equal(in_steps.step(part), expected[:, start : start + len(part)])
            start += len(part)
        assert (in_steps.next_position, in_steps.visual_tokens_left) == (at_once.next_position, 0)


@pytest.mark.parametrize("seed", range(12))
def test_positions_are_those_of_transformers_wherever_steps_are_cut(reference: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    prompt = conversation(rng, reference)
    check_any_steps(prompt, prompt.index(reference)[0], rng)


@pytest.mark.parametrize("seed", range(12))
def test_videos_without_timestamps(timed: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    prompt = conversation(rng, timed)
    check_any_steps(prompt, prompt.index(timed)[0], rng)


@pytest.mark.parametrize("seconds", [0.1, 1 / 3, 0.5, 1.0, 1.3, 2 / 3.7, 41.0])
def test_text_starts_behind_the_last_moment_of_a_video(timed: Any, seconds: float) -> None:
    """As transformers' decoding after a video; text within its prompt starts earlier there (see the module)."""
    prompt = Prompt(info_of(timed))
    prompt.add_text(3)
    prompt.add_run(9, 2, 3, seconds)
    expected, delta = prompt.index(timed)
    positions = MRopePositions()
    positions.expect(prompt.blocks)
    np.testing.assert_array_equal(positions.step(prompt.visual), expected)
    assert positions.next_position == len(prompt.types) + delta == expected.max() + 1
    np.testing.assert_array_equal(positions.step(np.zeros(1, np.bool_)), [[expected.max() + 1]] * 3)


def test_an_interval_is_not_rounded_before_it_is_multiplied() -> None:
    """At 4 frames per second a temporal patch of two is one position of half a second."""
    positions = MRopePositions()
    positions.expect([(4, 1, 1, 1.0), (4, 1, 1, 0.5)])
    np.testing.assert_array_equal(positions.step(np.ones(8, np.bool_))[0], [0, 1, 2, 3, 4, 4, 5, 5])


@pytest.mark.parametrize("seed", range(4))
def test_generation_goes_on_where_transformers_does(reference: Any, seed: int) -> None:
    prompt = conversation(np.random.default_rng(100 + seed), reference)
    positions = MRopePositions()
    positions.expect(prompt.blocks)
    positions.step(prompt.visual)
    assert positions.next_position == len(prompt.types) + prompt.index(reference)[1]


def test_text_counts_on() -> None:
    positions = MRopePositions()
    for start, count in ((0, 5), (5, 1), (6, 0), (6, 3)):
        expected = np.broadcast_to(np.arange(start, start + count), (3, count))
        found = positions.step(np.zeros(count, np.bool_))
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == np.int64
    assert positions.next_position == 9


def test_one_integer_is_the_state_between_images() -> None:
    visual = np.array([False, True, True, True, True, True, True, False])
    first = MRopePositions()
    first.expect([(1, 2, 3, 1.0)])
    first.step(visual)
    assert (first.next_position, first.visual_tokens_left) == (1 + 3 + 1, 0)
    second = MRopePositions(next_position=first.next_position)
    for positions in (first, second):
        positions.expect([(1, 3, 2, 1.0)])
    np.testing.assert_array_equal(second.step(visual), first.step(visual))
    first.reset()
    assert first.next_position == 0
    np.testing.assert_array_equal(first.step(visual[:1]), [[0]] * 3)


def test_images_side_by_side() -> None:
    positions = MRopePositions()
    positions.expect([(1, 1, 2, 1.0), (1, 1, 1, 1.0)])
    np.testing.assert_array_equal(positions.step(np.ones(3, np.bool_)), [[0, 0, 2], [0, 0, 2], [0, 1, 2]])


def test_how_pictures_are_placed() -> None:
    assert picture_blocks(vision_info(), (3, 4, 8)) == [(1, 2, 4, 1.0)] * 3
    timed = vision_info(tokens_per_second=2.0)
    assert picture_blocks(timed, (3, 4, 8), second_per_grid=0.25) == [(3, 2, 4, 0.5)]
    assert picture_blocks(timed, (3, 4, 8), second_per_grid=(0.0, 0.25, 2.0)) == [(3, 2, 4, (0.0, 0.5, 4.0))]
    assert picture_blocks(timed, (1, 4, 8)) == [(1, 2, 4, 2.0)]
    assert picture_blocks(vision_info(spatial_merge_size=1, keeps_class_token=True), (1, 3, 3), axes=1) == [
        (1, 1, 10, 1.0)
    ]


@pytest.mark.parametrize("grid", [(1, 2, 3), (1, 3, 2), (0, 2, 2), (1, 2, -2)])
def test_grids_that_cannot_be(grid: Grid) -> None:
    with pytest.raises(OptionError, match=rf"h and w multiples of 2; got \({', '.join(map(str, grid))}\)"):
        picture_blocks(vision_info(), grid)


@pytest.mark.parametrize("seconds", [1e9, float("inf")])
def test_videos_without_end(seconds: float) -> None:
    with pytest.raises(OptionError, match=r"a video of .* seconds has more positions than can be counted; .* fps"):
        picture_blocks(vision_info(tokens_per_second=2.0), (2, 2, 2), second_per_grid=seconds)


def test_with_one_axis_each_token_takes_a_position() -> None:
    positions = MRopePositions(1, 5)
    positions.expect([(1, 1, 6, 1.0)] * 2)
    visual = np.array([0, 1, 1, 1, 1, 1, 1, 0, 1, 1], np.bool_)
    np.testing.assert_array_equal(positions.step(visual), [np.arange(5, 15)])
    assert positions.visual_tokens_left == 4
    positions.drop()
    assert (positions.next_position, positions.visual_tokens_left) == (15, 0)
    np.testing.assert_array_equal(positions.step(visual[:1]), [[15]])


@pytest.mark.parametrize(
    ("visual", "blocks", "said"),
    [
        ([0, 1, 0], [(1, 2, 2, 1.0)], "token 2 of this step is text, but the image before it has 3 more tokens"),
        ([0, 1], [], "token 1 of this step stands for an image that was not given"),
        ([1, 1], [(1, 1, 1, 1.0)], "token 1 of this step stands for an image that was not given"),
    ],
)
def test_what_does_not_fit_changes_nothing(visual: list[int], blocks: list[Block], said: str) -> None:
    positions = MRopePositions(next_position=7)
    with pytest.raises(OptionError, match=said):
        positions.check(np.array(visual, np.bool_), blocks)
    assert (positions.next_position, positions.visual_tokens_left) == (7, 0)
    np.testing.assert_array_equal(positions.step(np.zeros(1, np.bool_)), [[7]] * 3)


def test_text_within_an_image_of_an_earlier_step() -> None:
    positions = MRopePositions()
    positions.expect([(1, 1, 3, 1.0)])
    positions.step(np.ones(2, np.bool_))
    assert positions.visual_tokens_left == 1
    with pytest.raises(OptionError, match="token 0 of this step is text, but the image before it has 1 more"):
        positions.step(np.zeros(1, np.bool_))
    np.testing.assert_array_equal(positions.step(np.array([True, False])), [[0, 3], [0, 3], [2, 3]])
