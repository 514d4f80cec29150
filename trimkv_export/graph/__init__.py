"""The ONNX graphs: operators, their portable bodies, the decoder and the vision tower."""

from trimkv_export.graph.decoder import LM_HEAD, GateSpec, build_decoder, cache_spec, gate_weight
from trimkv_export.graph.vision import build_vision
from trimkv_export.graph.weights import ModelGraph, Weight

__all__ = [
    "LM_HEAD",
    "GateSpec",
    "ModelGraph",
    "Weight",
    "build_decoder",
    "build_vision",
    "cache_spec",
    "gate_weight",
]
