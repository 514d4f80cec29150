"""Which activations a graph makes, how large they are, and how long they live: from shapes alone, without weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import onnx
import onnx.inliner

from trimkv_export.plan import Lifetime, lifetimes_of

__all__ = ["Activations", "graph_activations"]

# Nodes whose output is their first input under another shape: one buffer serves both.
VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten")
# The two sizes of a dynamic dimension that shapes are inferred for. Small ones: inference also follows values.
PROBES = (2, 3)


@dataclass(frozen=True)
class Activations:
    """The tensors that one run makes.

    dims: the dynamic dimensions, with the two values of each that `sizes` is for: bytes of each tensor at every
        combination. No dimension comes twice in a product, so these say the size for all values.
    steps: (names read, names made) of the nodes in order; a view goes by the name of what it shows.
    outputs: what is still there at the end.
    """

    dims: Mapping[str, tuple[int, int]]
    sizes: Mapping[str, Sequence[int]]
    steps: Sequence[tuple[Sequence[str], Sequence[str]]]
    outputs: frozenset[str]

    def lifetimes(self, **dims: int) -> list[Lifetime]:
        """The tensors of a run with these sizes of the dynamic dimensions."""
        parts = [(high - dims[name], dims[name] - low) for name, (low, high) in self.dims.items()]
        shares = [math.prod(part) for part in product(*parts)]
        whole = math.prod(high - low for low, high in self.dims.values())
        sizes = {
            name: sum(size * share for size, share in zip(found, shares, strict=True)) // whole
            for name, found in self.sizes.items()
        }
        return lifetimes_of(self.steps, sizes, self.outputs)


def graph_activations(
    model: onnx.ModelProto,
    inlined: Sequence[tuple[str, str]] = (),
    skip: Sequence[str] = (),
    multiple_of: Mapping[str, int] | None = None,
    scratch: Mapping[str, int] | None = None,
) -> Activations:
    """Analyse a graph; its dynamic dimensions are those that its inputs name.

    inlined: (domain, name) of the model-local functions whose bodies run node by node; other functions are one node,
        such as those that a native kernel serves.
    skip: outputs that are bound to memory of their own.
    multiple_of: what a dimension must be a multiple of, as patches that are merged.
    scratch: kind of node -> what its kernel works in meanwhile, as a multiple of its first output.
    """
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    for tensor in probe.graph.initializer:
        probe.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    del probe.graph.initializer[:]
    if inlined:
        probe = onnx.inliner.inline_selected_functions(probe, list(inlined), exclude=False)
    shapes = [value.type.tensor_type.shape.dim for value in model.graph.input]
    names = dict.fromkeys(dim.dim_param for shape in shapes for dim in shape if dim.dim_param)
    scale = {name: (multiple_of or {}).get(name, 1) for name in names}
    dims = {name: (PROBES[0] * scale[name], PROBES[1] * scale[name]) for name in names}
    found = [_sizes(probe, dict(zip(dims, point, strict=True))) for point in product(*dims.values())]
    sizes = {name: [part[name] for part in found] for name in found[0] if name not in skip}

    # A kernel's own memory is a tensor that lives for its step alone.
    factors = {name: (scratch or {}).get(node.op_type, 0) for node in probe.graph.node for name in node.output[:1]}
    own = {name: f"{name}.scratch" for name, factor in factors.items() if factor and name in sizes}
    sizes |= {own[name]: [factors[name] * size for size in sizes[name]] for name in own}

    shown: dict[str, str] = {}
    steps: list[tuple[list[str], list[str]]] = []
    for node in probe.graph.node:
        read = [shown.get(name, name) for name in node.input]
        if node.op_type in VIEWS:
            shown[node.output[0]] = read[0]
        made = [] if node.op_type in VIEWS else list(node.output)
        steps.append((read, made + [own[name] for name in made[:1] if name in own]))
    outputs = frozenset(shown.get(output.name, output.name) for output in probe.graph.output)
    return Activations(dims, sizes, steps, outputs)


def _sizes(model: onnx.ModelProto, dims: Mapping[str, int]) -> dict[str, int]:
    """Bytes of every tensor that nodes make, with the dynamic dimensions set; constants and unknown sizes left out."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    for value in [*probe.graph.input, *probe.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in dims:
                dim.CopyFrom(onnx.TensorShapeProto.Dimension(dim_value=dims[dim.dim_param]))
    inferred = onnx.shape_inference.infer_shapes(probe, data_prop=True)
    constants = {name for node in probe.graph.node if node.op_type == "Constant" for name in node.output}
    out = {}
    for value in [*inferred.graph.value_info, *inferred.graph.output]:
        shape = value.type.tensor_type.shape.dim
        if value.name not in constants and all(dim.HasField("dim_value") for dim in shape):
            itemsize = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).itemsize
            out[value.name] = itemsize * math.prod(dim.dim_value for dim in shape)
    return out
