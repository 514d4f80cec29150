"""Check a graph before, or without, its weights."""

import onnx

__all__ = ["check_graph"]


def check_graph(model: onnx.ModelProto) -> None:
    """Run the ONNX checker and strict shape inference; raises as they do.

    The checker wants external files in place, and refuses hard-linked ones; so weights are shown to it as inputs.
    """
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    for tensor in probe.graph.initializer:
        probe.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    del probe.graph.initializer[:]
    onnx.checker.check_model(probe, full_check=True)
