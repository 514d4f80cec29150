"""The conversation of a self-check: whole in any steps, its positions those of transformers' get_rope_index."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from seeing import FAMILIES, make_seeing_checkpoint
from support import build, make_checkpoint
from transformers import Qwen2_5_VLConfig, Qwen3VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from trimkv_export.package import Package, PackageConfig
from trimkv_export.verify.conversation import Conversation

# Temporal patches, rows and columns in tokens; videos have no more positions in time than in height or width, as
# transformers 5 places the text after them by these two alone.
PICTURES = [(1, 2, 5), (1, 4, 3), (2, 3, 3), (1, 1, 1), (2, 1, 7)]
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PackageConfig]:
    """Of small packages, by family."""
    found = {}
    for family in ("qwen3_vl", *FAMILIES):
        folder = tmp_path_factory.mktemp(family)
        make = make_checkpoint if family == "qwen3_vl" else make_seeing_checkpoint
        found[family] = Package.open(build(make(folder / "checkpoint", family=family), folder / "package").path).config
    return found


@pytest.fixture
def config(configs: dict[str, PackageConfig]) -> PackageConfig:
    return configs["qwen3_vl"]


def reference(config: PackageConfig, family: str) -> Any:
    """A model without weights."""
    assert config.vision is not None
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = sizes | {"num_key_value_heads": 2, "vocab_size": 32, "rope_parameters": ROPE}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "spatial_merge_size": config.vision.spatial_merge_size}
    with torch.device("meta"):
        if family == "qwen3_vl":
            return Qwen3VLModel(Qwen3VLConfig(text_config=text | {"head_dim": 8}, vision_config=vision))
        vision["tokens_per_second"] = int(config.vision.tokens_per_second or 0)
        return Qwen2_5_VLModel(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("most", [1, 4, 9, 200])
def test_pictures_in_steps(configs: dict[str, PackageConfig], family: str, most: int) -> None:
    config = configs[family]
    vision, rng = config.vision, np.random.default_rng(0)
    assert vision is not None
    conversation = Conversation(config, rng)
    for sizes in PICTURES:
        conversation.add_picture(vision, *sizes)
    turns = []
    while conversation.pending:
        turns.append(conversation.take(int(rng.integers(1, most + 1))))
    tokens = np.concatenate([turn.tokens for turn in turns])
    visual = np.isin(tokens, vision.placeholder_ids)
    grids = np.concatenate([turn.image_grid_thw for turn in turns if turn.image_grid_thw is not None])
    pixels = np.concatenate([turn.pixel_values for turn in turns if turn.pixel_values is not None])
    merge = vision.spatial_merge_size
    assert grids.tolist() == [[frames, rows * merge, columns * merge] for frames, rows, columns in PICTURES]
    assert pixels.shape == (grids.prod(axis=1).sum(), vision.patch_dim)
    assert np.concatenate([turn.number for turn in turns]).tolist() == list(range(visual.sum()))
    for turn in turns:
        assert turn.place.tolist() == np.flatnonzero(np.isin(turn.tokens, vision.placeholder_ids)).tolist()

    for turn in turns:  # a picture is given with its first token
        given = 0 if turn.image_grid_thw is None else len(turn.image_grid_thw)
        assert given == np.isin(turn.number, [0, 10, 22, 40, 41]).sum()

    images, videos = grids[grids[:, 0] == 1], grids[grids[:, 0] > 1]
    types = (tokens == vision.image_token_id) + 2 * (tokens == vision.video_token_id)
    expected, _ = reference(config, family).get_rope_index(
        torch.from_numpy(tokens)[None], torch.from_numpy(types)[None], torch.tensor(images), torch.tensor(videos)
    )
    np.testing.assert_array_equal(np.concatenate([turn.positions for turn in turns], axis=1), expected[:, 0])


def test_a_video_takes_the_seconds_it_lasts(configs: dict[str, PackageConfig]) -> None:
    """Two positions a second, and a second for each temporal patch; text starts behind the last of them."""
    config = configs["qwen2_5_vl"]
    assert config.vision is not None
    conversation = Conversation(config, np.random.default_rng(0))
    conversation.add_picture(config.vision, 4, 1, 2)
    turn = conversation.take(12)
    assert turn.positions.tolist() == [
        [0, 1, 2, 2, 4, 4, 6, 6, 8, 8, 9, 10],
        [0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 9, 10],
        [0, 1, 2, 3, 2, 3, 2, 3, 2, 3, 9, 10],
    ]


def test_images_of_one_size(configs: dict[str, PackageConfig]) -> None:
    """Nor does the model take videos, or count rows and columns."""
    config = configs["llava"]
    assert config.vision is not None
    conversation = Conversation(config, np.random.default_rng(0))
    for sizes in PICTURES:
        assert conversation.add_picture(config.vision, *sizes).grid == (1, 4, 4)
    turn = conversation.take(conversation.pending)
    assert turn.positions.tolist() == [list(range(5 * 18))] * 3
    assert turn.number.tolist() == list(range(5 * 16))
    assert set(np.array(turn.tokens)[turn.place]) == {config.vision.image_token_id}


def test_text_of_a_model_that_does_not_see(package: Path) -> None:
    config = Package.open(package).config
    conversation, rng = Conversation(config, np.random.default_rng(3)), np.random.default_rng(3)
    start = 0
    for length in (5, 1, 16):
        turn = conversation.take(length)
        assert turn.tokens == rng.integers(0, config.model.vocab_size, length).tolist()
        assert turn.positions.tolist() == [list(range(start, start + length))] * 3
        assert (turn.place.size, turn.pixel_values, turn.image_grid_thw) == (0, None, None)
        start += length
    assert conversation.pictures == []


def test_text_never_stands_for_pictures(config: PackageConfig) -> None:
    assert config.vision is not None
    tokens = Conversation(config, np.random.default_rng(0)).take(10_000).tokens
    assert set(range(config.model.vocab_size)) - set(tokens) == set(config.vision.placeholder_ids)


@pytest.mark.parametrize(("most", "tokens"), [(1, (1, 1)), (3, (3, 1)), (7, (4, 1)), (8, (4, 2)), (99, (4, 3))])
def test_pictures_are_as_large_as_the_package_takes(config: PackageConfig, most: int, tokens: tuple[int, int]) -> None:
    assert config.vision is not None
    info = dataclasses.replace(config.vision, max_image_tokens=most)
    picture = Conversation(config, np.random.default_rng(0)).add_picture(info, 1, 4, 3)
    assert picture.grid == (1, *(size * info.spatial_merge_size for size in tokens))
