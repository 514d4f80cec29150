"""Check a graph before, or without, its weights."""

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from trimkv_export.errors import VerificationError
from trimkv_export.words import first_line

__all__ = ["check_graph", "check_graph_file"]


def check_graph(model: onnx.ModelProto) -> None:
    """Run the ONNX checker and strict shape inference, and raise what they raise.

    The checker wants external files in place, and refuses hard-linked ones; so weights are shown to it as inputs.
    """
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    for tensor in probe.graph.initializer:
        probe.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    del probe.graph.initializer[:]
    onnx.checker.check_model(probe, full_check=True)


def check_graph_file(file: Path) -> None:
    """Check a graph on disk, without its weights.

    Raises:
        VerificationError: it is not valid.
    """
    try:
        check_graph(onnx.load(str(file), load_external_data=False))
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, DecodeError) as error:
        raise VerificationError(f"{file.parent}: {file.name} is not a valid graph: {first_line(error)}") from None
