"""The vision tower's graph, against transformers' Qwen3VLVisionModel."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnxruntime as ort
import pytest
import torch
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from vision_harness import run, with_weights

from trimkv_export.config import FLOATS, Precision
from trimkv_export.graph import build_vision
from trimkv_export.graph.check import check_graph
from trimkv_export.models import VisionSpec, vision_spec

CONFIG: dict[str, Any] = {
    "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2,
    "spatial_merge_size": 2, "out_hidden_size": 24, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
    "in_channels": 3, "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "odd_position_grid": {"num_position_embeddings": 49},
    "no_deepstack": {"deepstack_visual_indexes": []},
    "unordered_deepstack": {"deepstack_visual_indexes": [2, 0, 1]},
    "merge_3": {"spatial_merge_size": 3},
    "no_merge": {"spatial_merge_size": 1},
    "heads_of_24": {"hidden_size": 96, "num_heads": 4},
    "gelu_one_frame": {"hidden_act": "gelu", "temporal_patch_size": 1},
}
GRIDS = [(1, 6, 6), (1, 6, 12), (1, 18, 6), (3, 6, 12), (2, 24, 18)]


def spec_of(config: dict[str, Any]) -> VisionSpec:
    text = {"hidden_size": config["out_hidden_size"], "num_hidden_layers": 4, "vocab_size": 100}
    tokens = {f"{name}_token_id": i for i, name in enumerate(("image", "video", "vision_start", "vision_end"))}
    found = vision_spec({"model_type": "qwen3_vl", "vision_config": config, "text_config": text} | tokens, Path())
    assert found is not None
    return found[0]


def reference(config: dict[str, Any]) -> Qwen3VLVisionModel:
    torch.manual_seed(0)
    model = Qwen3VLVisionModel(Qwen3VLVisionConfig(**config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return model


def state_of(model: Qwen3VLVisionModel) -> dict[str, torch.Tensor]:
    return {f"model.visual.{name}": value for name, value in model.state_dict().items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_equal_transformers(variant: str) -> None:
    config = CONFIG | VARIANTS[variant]
    spec, model = spec_of(config), reference(config)
    graph = with_weights(spec, Precision.FP32, state_of(model))
    onnx.checker.check_model(graph, full_check=True)
    rng = np.random.default_rng(0)
    for grid in GRIDS:
        pixels = rng.standard_normal((int(np.prod(grid)), spec.patch_dim), np.float32)
        with torch.no_grad():
            expected = model(torch.from_numpy(pixels), torch.tensor([grid]))
        embeds, *deepstack = run(graph, spec, pixels, grid)
        np.testing.assert_allclose(embeds, expected.pooler_output.numpy(), atol=2e-5)
        assert len(deepstack) == bool(config["deepstack_visual_indexes"])
        if deepstack:
            features = torch.stack(expected.deepstack_features).numpy()
            np.testing.assert_allclose(deepstack[0], features, atol=2e-5)


def test_half_precision() -> None:
    spec, model = spec_of(CONFIG), reference(CONFIG)
    pixels = np.random.default_rng(0).standard_normal((72, spec.patch_dim), np.float32)
    exact = run(with_weights(spec, Precision.FP32, state_of(model)), spec, pixels, (1, 6, 12))
    half = run(with_weights(spec, Precision.FP16, state_of(model)), spec, pixels, (1, 6, 12))
    for found, expected in zip(half, exact, strict=True):
        assert found.dtype == np.float16
        np.testing.assert_allclose(found.astype(np.float32), expected, atol=0.03)


def test_the_body_of_attention_equals_the_kernel() -> None:
    spec = spec_of(CONFIG)
    graph = with_weights(spec, Precision.FP32, state_of(reference(CONFIG)))
    plain = onnx.inliner.inline_local_functions(graph)
    assert {node.domain for node in plain.graph.node} == {""}
    assert sum(node.op_type == "Attention" for node in plain.graph.node) == spec.depth
    pixels = np.random.default_rng(0).standard_normal((2 * 72, spec.patch_dim), np.float32)
    for found, expected in zip(run(plain, spec, pixels, (2, 6, 12)), run(graph, spec, pixels, (2, 6, 12)), strict=True):
        np.testing.assert_allclose(found, expected, atol=5e-6)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_onnx_runtime_takes_its_kernel(precision: Precision, tmp_path: Path) -> None:
    # The body has all scores in memory: a gigabyte for an image of 4,096 patches.
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3  # it warns that this file is for this machine
    graph = with_weights(spec_of(CONFIG), precision, state_of(reference(CONFIG)))
    ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert operators.count("MultiHeadAttention") == CONFIG["depth"]
    assert "Attention" not in operators


@pytest.mark.parametrize("precision", FLOATS)
def test_graph_is_valid(precision: Precision) -> None:
    graph = build_vision(spec_of(CONFIG), precision)
    check_graph(graph.model)
    assert {weight.dtype for weight in graph.weights} == {precision.dtype}


def test_full_size_graph_is_small() -> None:
    config = CONFIG | {
        "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "patch_size": 16,
        "out_hidden_size": 2560, "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17],
    }  # fmt: skip
    graph = build_vision(spec_of(config), Precision.BF16)
    assert graph.model.ByteSize() < 300_000
    names = [weight.name for weight in graph.weights]
    assert len(names) == len(set(names)) == 2 + 1 + 24 * 12 + 4 * 6
    parameters = sum(int(np.prod(weight.shape)) for weight in graph.weights)
    assert parameters == sum(int(np.prod(shape)) for shape in spec_of(config).tensors().values())
