"""A thin layer over `onnx.helper`: nodes in order, constants once, values named by strings."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike, DTypeLike

__all__ = ["OPSET", "GraphBuilder"]

# RMSNormalization and RotaryEmbedding are standard operators from here on.
OPSET = 23


class GraphBuilder:
    """Collects the nodes of one graph, function body or branch.

    Methods return names of values. Nodes are named by the caller where the name means something (a module path), else
    after their first output.
    """

    def __init__(self, prefix: str = "") -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._prefix = prefix
        self._count = 0
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def _fresh(self, stem: str) -> str:
        self._count += 1
        return f"{self._prefix}{stem}_{self._count}"

    def ops(
        self,
        op_type: str,
        inputs: Sequence[str],
        outputs: int | Sequence[str],
        *,
        name: str | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> list[str]:
        """Add a node with several outputs (a count, or their names)."""
        if isinstance(outputs, int):
            stem = name or op_type
            outputs = [self._fresh(stem) for _ in range(outputs)]
        node = onnx.helper.make_node(
            op_type, list(inputs), list(outputs), name=name or outputs[0], domain=domain, **attributes
        )
        self.nodes.append(node)
        return list(outputs)

    def op(self, op_type: str, *inputs: str, output: str | None = None, name: str | None = None, **attrs: Any) -> str:
        """Add a node with one output and return its name."""
        return self.ops(op_type, inputs, 1 if output is None else [output], name=name, **attrs)[0]

    def const(self, value: ArrayLike, dtype: DTypeLike = np.int64) -> str:
        """A constant; equal constants are added once."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            output = self._fresh("const")
            self.nodes.append(
                onnx.helper.make_node("Constant", [], [output], name=output, value=onnx.numpy_helper.from_array(array))
            )
            self._constants[key] = output
        return self._constants[key]

    def attribute(self, name: str, kind: onnx.AttributeProto.AttributeType, shape: Sequence[int] | None = None) -> str:
        """The value of the enclosing function's attribute `name`, as a scalar or with `shape` (all ones)."""
        field = {onnx.AttributeProto.INT: "value_int", onnx.AttributeProto.FLOAT: "value_float"}[kind]
        output = self._fresh(name)
        node = onnx.helper.make_node("Constant", [], [output], name=output)
        reference = node.attribute.add()
        reference.name, reference.ref_attr_name, reference.type = field, name, kind
        self.nodes.append(node)
        return output if shape is None else self.reshape(output, list(shape))

    def function(
        self,
        domain: str,
        name: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        attributes: Sequence[str] = (),
        *,
        uses: Sequence[str] = (),
        doc_string: str | None = None,
    ) -> onnx.FunctionProto:
        """The nodes as the body of a model-local function; `uses` are domains of its nodes, version 1, after ONNX's."""
        opsets = [onnx.helper.make_opsetid("", OPSET), *(onnx.helper.make_opsetid(used, 1) for used in uses)]
        return onnx.helper.make_function(
            domain, name, inputs, outputs, self.nodes, opsets, attributes, doc_string=doc_string
        )

    # Shorthands for what appears everywhere.

    def reshape(self, value: str, shape: str | Sequence[int], output: str | None = None) -> str:
        """Reshape; a 0 in `shape` means 0, because heads may be empty."""
        if not isinstance(shape, str):
            shape = self.const(list(shape))
        return self.op("Reshape", value, shape, output=output, allowzero=1)

    def shape_of(self, *dims: str | int) -> str:
        """A shape vector from [1]-shaped values and numbers."""
        return self.op("Concat", *(self.const([d]) if isinstance(d, int) else d for d in dims), axis=0)

    def dim(self, value: str, axis: int) -> str:
        """One dimension of `value` as an int64 [1]."""
        return self.op("Shape", value, start=axis, end=axis + 1)

    def slice(self, value: str, start: str | int, end: str | int, axis: int) -> str:
        """value[…, start:end, …] along `axis`; bounds are numbers or int64 [1]."""
        bounds = [self.const([b]) if isinstance(b, int) else b for b in (start, end)]
        return self.op("Slice", value, *bounds, self.const([axis]))

    def squeeze(self, value: str, *axes: int) -> str:
        """Drop axes of size 1."""
        return self.op("Squeeze", value, self.const(list(axes)))

    def unsqueeze(self, value: str, *axes: int) -> str:
        """Add axes of size 1."""
        return self.op("Unsqueeze", value, self.const(list(axes)))

    def cast(self, value: str, to: int) -> str:
        """Convert to the element type `to` (onnx.TensorProto.…)."""
        return self.op("Cast", value, to=to)

    def arange(self, end: str, start: str | None = None, step: str | None = None) -> str:
        """Range(start, end, step) of int64 [1] values; by default from 0 by 1."""
        scalars = [self.squeeze(v, 0) if v else self.const(default) for v, default in ((start, 0), (end, 0), (step, 1))]
        return self.op("Range", *scalars)

    def linear(self, value: str, weight: str, bias: str | None = None, name: str | None = None) -> str:
        """x·Wᵀ + b for x [rows, in] and W [out, in], the layout of the checkpoint, so no weight is transposed."""
        inputs = (value, weight) if bias is None else (value, weight, bias)
        return self.op("Gemm", *inputs, name=name, transB=1)

    def activation(self, value: str, kind: str) -> str:
        """`hidden_act` of a Hugging Face config."""
        match kind:
            case "silu":
                return self.op("Mul", value, self.op("Sigmoid", value))
            case "gelu":
                return self.op("Gelu", value)
            case "gelu_pytorch_tanh":
                return self.op("Gelu", value, approximate="tanh")
            case "quick_gelu":
                scaled = self.op("Mul", value, self.op("CastLike", self.const(1.702, np.float32), value))
                return self.op("Mul", value, self.op("Sigmoid", scaled))
            case "relu":
                return self.op("Relu", value)
        raise ValueError(f"activation {kind!r}")
