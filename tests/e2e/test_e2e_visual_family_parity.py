"""Random small models of the other families with a vision tower against transformers, with a budget that nothing is
evicted from: images are given as patches, in steps that cut them.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support import build, random_tokens
from visual_models import IMAGE, save_checkpoint, visual_model

from trimkv_export.runtime import Engine

TOLERANCE = 2e-4
LENGTHS = (7, 1, 19, 2, 30, 64)
QWEN2: dict[str, Any] = {"model_type": "qwen2", "num_attention_heads": 6, "num_key_value_heads": 1}
# Family, changes of its config, and names of tensors.
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "qwen2_5_vl": ("qwen2_5_vl", {}, "hub"),
    "qwen2_5_vl_tied": (
        "qwen2_5_vl",
        {"tie_word_embeddings": True, "text_config": {"num_key_value_heads": 1}},
        "memory",
    ),
    "qwen2_5_vl_merge_3": (
        "qwen2_5_vl",
        {"vision_config": {"spatial_merge_size": 3, "window_size": 60, "fullatt_block_indexes": [0, 2]}},
        "library",
    ),
    "llava": ("llava", {}, "hub"),
    "llava_qwen2": ("llava", {"text_config": QWEN2, "multimodal_projector_bias": False}, "memory"),
    "llava_full_last_layer": (
        "llava",
        {"vision_feature_select_strategy": "full", "vision_feature_layer": -1, "tie_word_embeddings": True},
        "library",
    ),
}
# Grids of images in tokens; numbers are tokens of text, without which transformers takes two images for one.
CONVERSATION: list[Any] = [4, (2, 3), 3, (1, 7), 1, (5, 4), 6]


def patches(image: torch.Tensor, size: int) -> NDArray[np.float32]:
    """An image [3, n·size, n·size] as patches [n², 3·size²], row by row."""
    rows = image.shape[1] // size
    cut = image.reshape(3, rows, size, rows, size).permute(1, 3, 0, 2, 4)
    return np.asarray(cut.reshape(rows * rows, -1).numpy())


def read(model: Any) -> tuple[list[int], list[tuple[int, NDArray[np.float32], Any]], dict[str, torch.Tensor]]:
    """Tokens; images as (first token, patches, grid); and what transformers takes besides tokens."""
    rng, vision = np.random.default_rng(0), model.config.vision_config
    tokens: list[int] = []
    images: list[tuple[int, NDArray[np.float32], Any]] = []
    if model.config.model_type == "llava":
        whole = torch.from_numpy(rng.standard_normal((3, 3, vision.image_size, vision.image_size), np.float32))
        side = vision.image_size // vision.patch_size
        count = side * side + (model.config.vision_feature_select_strategy == "full")
        inputs = {"pixel_values": whole}
    else:
        merge = vision.spatial_merge_size
        dim = 3 * vision.temporal_patch_size * vision.patch_size**2
    for number, part in enumerate(CONVERSATION):
        if isinstance(part, int):
            tokens += random_tokens(part, seed=number, vocabulary=IMAGE)
            continue
        if model.config.model_type == "llava":
            images.append((len(tokens), patches(whole[len(images)], vision.patch_size), (1, side, side)))
        else:
            grid, count = (1, part[0] * merge, part[1] * merge), part[0] * part[1]
            images.append((len(tokens), rng.standard_normal((count * merge**2, dim), np.float32), grid))
        tokens += [IMAGE] * count
    if model.config.model_type != "llava":
        inputs = {
            "pixel_values": torch.from_numpy(np.concatenate([pixels for _, pixels, _ in images])),
            "image_grid_thw": torch.tensor([grid for _, _, grid in images]),
            "mm_token_type_ids": torch.tensor([[int(token == IMAGE) for token in tokens]]),
        }
    return tokens, images, inputs


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    family, changes, layout = CASES[case]
    model = visual_model(family, **changes)
    save_checkpoint(tmp_path, model, layout, gate="rg" if case.endswith("tied") else "rg10")
    build(tmp_path, tmp_path / "package", budget=512, prefill_chunk=64, max_image_tokens=40)
    tokens, images, inputs = read(model)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([tokens]), **inputs).logits[0].numpy()
    assert np.abs(expected).max() > 1
    with Engine.open(tmp_path / "package", threads=1) as engine:
        session, at = engine.session(), 0
        for length in LENGTHS * 2:
            end = min(at + length, len(tokens))
            begun = [(pixels, grid) for start, pixels, grid in images if at <= start < end]
            given: Any = (None, None)
            if begun:
                given = np.concatenate([pixels for pixels, _ in begun]), np.array([grid for _, grid in begun])
            logits = session.step(tokens[at:end], *given)
            np.testing.assert_allclose(logits, expected[end - 1], rtol=0, atol=TOLERANCE)
            at = end
            if at == len(tokens):
                break
        assert at == len(tokens)
        assert session.evictions == 0
