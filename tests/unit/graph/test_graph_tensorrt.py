"""Graphs as TensorRT's parser gets them compute what the package's graphs do."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from seeing import FAMILIES, make_seeing_checkpoint
from support import MAX_IMAGE_TOKENS, build

from trimkv_export.graph.tensorrt import for_tensorrt, standard_operators
from trimkv_export.package import Package
from trimkv_export.vision.grid import vision_grid

# What the parser of TensorRT 10.3 does not know, and what it could not know.
OLD = {"Attention", "RMSNormalization", "RotaryEmbedding"}


@pytest.fixture(scope="module", params=["qwen3_vl", *FAMILIES])
def tower(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with a vision tower."""
    if request.param == "qwen3_vl":
        found: Path = request.getfixturevalue("visual_package")
        return found
    folder = tmp_path_factory.mktemp(request.param)
    make_seeing_checkpoint(folder, request.param)
    return build(folder, folder / "package", max_image_tokens=MAX_IMAGE_TOKENS).path


def run(model: onnx.ModelProto, feed: dict[str, Any]) -> list[NDArray[np.float32]]:
    found: list[NDArray[np.float32]] = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feed)
    return found


@pytest.mark.parametrize("unsupported", [set(), {"RotaryEmbedding"}, OLD], ids=["new", "one", "old"])
def test_vision_towers(tower: Path, unsupported: set[str]) -> None:
    model, info = onnx.load(str(tower / "vision.onnx")), Package.open(tower).config.vision
    assert info is not None
    changed = for_tensorrt(model, unsupported)
    assert not standard_operators(changed) & unsupported
    assert "Attention" not in {node.op_type for node in changed.graph.node}
    if "Attention" not in unsupported:  # where it has no mask it stays
        assert [[node.op_type for node in function.node] for function in changed.functions] == [["Attention"]]
    side = (info.image_size or 0) // info.patch_size
    height, width = (side, side) if side else (6 * info.spatial_merge_size, 5 * info.spatial_merge_size)
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, height * width, info.patch_dim)).astype(np.float32)
    feed = {"pixel_values": pixels} | vision_grid(info, height, width)
    for one, other in zip(run(model, feed), run(changed, feed), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_normalization(precision: str) -> None:
    """RMSNormalization by itself, in float32 whatever the type is."""
    kind = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16}[precision]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
    random = np.random.default_rng(0)
    x, scale = (100 * random.normal(size=(3, 5, 16))).astype(dtype), random.normal(size=16).astype(dtype)
    make = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("RMSNormalization", ["x", "scale"], ["y"], "norm", axis=-1, epsilon=1e-3, stash_type=1)],
        "norm",
        [make("x", kind, ["a", "b", 16])],
        [make("y", kind, ["a", "b", 16])],
        [onnx.numpy_helper.from_array(scale, "scale")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=11)
    changed = for_tensorrt(model, {"RMSNormalization"})
    onnx.checker.check_model(changed, full_check=True)
    assert [node.name for node in changed.graph.node][-1] == "norm"
    tolerance = {"fp32": 1e-5, "fp16": 1e-3}[precision]
    np.testing.assert_allclose(run(changed, {"x": x})[0], run(model, {"x": x})[0], rtol=tolerance)


def test_decoders(visual_package: Path) -> None:
    """With the plugins' bodies put back, from an empty cache."""
    model, config = onnx.load(str(visual_package / "decoder.onnx")), Package.open(visual_package).config
    changed = for_tensorrt(model, OLD)
    assert not standard_operators(changed) & OLD
    changed.functions.extend(function for function in model.functions if function.name.startswith("Pool"))
    for node in changed.graph.node:
        kept = [attribute for attribute in node.attribute if not attribute.name.startswith("plugin_")]
        del node.attribute[:]
        node.attribute.extend(kept)
    random, steps, width = np.random.default_rng(0), 7, config.model.hidden_size
    feed: dict[str, Any] = {
        "input_ids": random.integers(0, 200, (1, steps)),
        "position_ids": np.arange(3 * steps).reshape(3, 1, steps),
        "step_tokens": np.array([steps], np.int32),
        "budget": np.array([4], np.int32),
        "visual_index": np.array([2, 3]),
        "visual_embeds": random.normal(size=(2, width)).astype(np.float32),
        "deepstack_embeds": random.normal(size=(config.model.deepstack_layers, 2, width)).astype(np.float32),
    }
    feed |= {f"past.{tensor.name}": np.zeros((1, *tensor.shape[1:]), tensor.dtype) for tensor in config.cache.tensors()}
    for one, other in zip(run(model, feed), run(changed, feed), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
