"""The NumPy vision towers, against transformers on the weights of a package."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import build, make_checkpoint
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from visual_models import save_checkpoint, visual_model

from trimkv_export.package import Package, VisionInfo
from trimkv_export.verify.reference_vision import ReferenceTower
from trimkv_export.verify.stored_weights import activate

VARIANTS: dict[str, dict[str, Any]] = {
    "as_written": {},
    "gelu": {"hidden_act": "gelu"},
    "unordered_deepstack": {"deepstack_visual_indexes": [3, 0, 1]},
}
GRIDS = [(1, 2, 2), (1, 2, 10), (1, 12, 6), (3, 4, 8), (1, 34, 40)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_equal_transformers(variant: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", family="qwen3_vl")
    file = checkpoint / "base" / "config.json"
    config = json.loads(file.read_text())
    config["vision_config"] |= VARIANTS[variant]
    file.write_text(json.dumps(config))
    state = load_file(checkpoint / "base" / "model.safetensors")
    prefix = "model.visual."
    model = Qwen3VLVisionModel(Qwen3VLVisionConfig(**config["vision_config"])).eval()
    model.load_state_dict({k.removeprefix(prefix): v.float() for k, v in state.items() if k.startswith(prefix)})

    package = Package.open(build(checkpoint, tmp_path / "package").path)
    info = package.config.vision
    assert info is not None
    assert (info.prefix, info.hidden_act) == (prefix, config["vision_config"]["hidden_act"])
    assert list(info.deepstack_visual_indexes) == config["vision_config"]["deepstack_visual_indexes"]
    tower = ReferenceTower(package, info)
    rng = np.random.default_rng(0)
    for grid in GRIDS:
        patches = rng.uniform(-1, 1, (math.prod(grid), info.patch_dim)).astype(np.float32)
        embeds, deepstack = tower.encode(patches, grid)
        with torch.no_grad():
            expected = model(torch.from_numpy(patches), torch.tensor([grid]))
        np.testing.assert_allclose(embeds, expected.pooler_output.numpy(), atol=2e-5)
        np.testing.assert_allclose(deepstack, torch.stack(expected.deepstack_features).numpy(), atol=2e-5)
        assert embeds.dtype == deepstack.dtype == np.float32


def reference_tower(family: str, folder: Path) -> tuple[Any, VisionInfo, ReferenceTower]:
    model = visual_model(family)
    save_checkpoint(folder, model)
    package = Package.open(build(folder, folder / "package").path)
    assert package.config.vision is not None
    return model, package.config.vision, ReferenceTower(package, package.config.vision)


def test_windows_equal_transformers(tmp_path: Path) -> None:
    model, info, tower = reference_tower("qwen2_5_vl", tmp_path)
    for grid in GRIDS:
        patches = np.random.default_rng(0).uniform(-1, 1, (math.prod(grid), info.patch_dim)).astype(np.float32)
        embeds, deepstack = tower.encode(patches, grid)
        with torch.no_grad():
            expected = model.model.visual(torch.from_numpy(patches), torch.tensor([grid])).pooler_output
        np.testing.assert_allclose(embeds, expected.numpy(), atol=2e-5)
        assert deepstack.shape == (0, *embeds.shape)


def test_images_of_one_size_equal_transformers(tmp_path: Path) -> None:
    model, info, tower = reference_tower("llava", tmp_path)
    image = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (1, 3, 20, 20)).astype(np.float32))
    with torch.no_grad():
        expected = model.model.get_image_features(image).pooler_output[0]
    patches = image.reshape(3, 5, 4, 5, 4).permute(1, 3, 0, 2, 4).reshape(-1, info.patch_dim).numpy()
    embeds, _ = tower.encode(patches, (1, 5, 5))
    np.testing.assert_allclose(embeds, expected.numpy(), atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        ("silu", torch.nn.functional.silu),
        ("relu", torch.nn.functional.relu),
        ("gelu", torch.nn.functional.gelu),
        ("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x)),
        ("gelu_pytorch_tanh", lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    ],
)
def test_activations(kind: str, function: Any) -> None:
    x = np.linspace(-12, 12, 4001, dtype=np.float32)
    expected = function(torch.from_numpy(x).double()).numpy()
    np.testing.assert_allclose(activate(x, kind), expected, atol=4e-7, rtol=2e-7)
    assert activate(x, kind).dtype == np.float32


def test_an_unknown_activation() -> None:
    with pytest.raises(ValueError, match="swiglu"):
        activate(np.zeros(1, np.float32), "swiglu")
