"""The ONNX graph: operators, their portable bodies, and the decoder."""

from trimkv_export.graph.decoder import DecoderGraph, GateSpec, Weight, build_decoder, cache_spec, gate_weight

__all__ = ["DecoderGraph", "GateSpec", "Weight", "build_decoder", "cache_spec", "gate_weight"]
