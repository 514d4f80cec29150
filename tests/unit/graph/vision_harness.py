"""Vision towers' graphs with weights in them, and a run of one."""

from collections.abc import Mapping
from typing import Any

import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from trimkv_export.config import Precision
from trimkv_export.graph import build_vision
from trimkv_export.models import VisionSpec
from trimkv_export.vision.grid import vision_grid

__all__ = ["run", "with_weights"]


def with_weights(spec: VisionSpec, precision: Precision, state: Mapping[str, torch.Tensor]) -> onnx.ModelProto:
    """The graph with the weights of `state`, which holds exactly those."""
    graph = build_vision(spec, precision)
    assert {weight.name for weight in graph.weights} == set(state) == set(spec.tensors())
    del graph.model.graph.initializer[:]
    for weight in graph.weights:
        assert tuple(state[weight.name].shape) == spec.tensors()[weight.name]
        values = state[weight.name].float().numpy().reshape(weight.shape).astype(weight.dtype)
        graph.model.graph.initializer.append(onnx.numpy_helper.from_array(values, weight.name))
    return graph.model


def run(model: onnx.ModelProto, spec: VisionSpec, pixels: NDArray[Any], grid: tuple[int, int, int]) -> list[Any]:
    """Outputs for patches [t·h·w, patch_dim] of a grid (t, h, w)."""
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    values = pixels.reshape(grid[0], -1, spec.patch_dim)
    return list(session.run(None, {"pixel_values": values, **vision_grid(spec, *grid[1:])}))
