"""Which activations a graph makes, how large they are, and how long they live: from shapes alone, without weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product

import onnx
import onnx.inliner

from trimkv_export.plan.lifetimes import Lifetime, Peak, peak, spans

__all__ = ["Activations", "graph_activations"]

# Nodes whose output is their first input under another shape: one buffer serves both.
VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten")
# The two sizes of a dynamic dimension that shapes are inferred for. Small ones: inference also follows values.
PROBES = (2, 3)


@dataclass(frozen=True, eq=False)
class Activations:
    """The tensors that one run makes.

    Attributes:
        dims: the dynamic dimensions, with the two values of each that `sizes` is for.
        sizes: bytes of each tensor at every combination of these. No dimension comes twice in a product, so they say
            the size for all values.
        steps: (names read, names made) of the nodes in order; a view goes by the name of what it shows.
        outputs: what is still there at the end.
    """

    dims: Mapping[str, tuple[int, int]]
    sizes: Mapping[str, tuple[int, ...]]
    steps: Sequence[tuple[Sequence[str], Sequence[str]]]
    outputs: frozenset[str]

    @cached_property
    def _spans(self) -> dict[str, tuple[int, int]]:
        return spans(self.steps, self.outputs)

    @cached_property
    def _peaks(self) -> dict[tuple[int, ...], Peak]:
        return {}

    def lifetimes(self, **dims: int) -> list[Lifetime]:
        """The tensors of a run with these sizes of the dynamic dimensions."""
        parts = [(high - dims[name], dims[name] - low) for name, (low, high) in self.dims.items()]
        shares = [math.prod(part) for part in product(*parts)]
        whole = math.prod(high - low for low, high in self.dims.values())
        # Layers are alike, so there are few sizes.
        nbytes = {
            found: sum(size * share for size, share in zip(found, shares, strict=True)) // whole
            for found in set(self.sizes.values())
        }
        return [
            Lifetime(name, nbytes[self.sizes[name]], first, last)
            for name, (first, last) in self._spans.items()
            if name in self.sizes
        ]

    def peak(self, **dims: int) -> Peak:
        """The peak of a run with these sizes of the dynamic dimensions; those that the graph lacks do not matter."""
        here = {name: dims[name] for name in self.dims}
        key = tuple(here.values())
        if key not in self._peaks:  # searches ask for the same sizes again
            self._peaks[key] = peak(self.lifetimes(**here))
        return self._peaks[key]


def graph_activations(
    model: onnx.ModelProto,
    inlined: Sequence[tuple[str, str]] = (),
    skip: Sequence[str] = (),
    multiple_of: Mapping[str, int] | None = None,
    scratch: Mapping[str, int] | None = None,
) -> Activations:
    """Analyse a graph; its dynamic dimensions are those that its inputs name.

    Args:
        model: the graph.
        inlined: (domain, name) of the model-local functions whose bodies run node by node; other functions are one
            node, such as those that a native kernel serves.
        skip: outputs that are bound to memory of their own.
        multiple_of: what a dimension must be a multiple of, as patches that are merged.
        scratch: kind of node -> what its kernel works in meanwhile, as a multiple of its first output.
    """
    mappings = (tuple((given or {}).items()) for given in (multiple_of, scratch))
    return _analysed(model.SerializeToString(deterministic=True), tuple(inlined), frozenset(skip), *mappings)


@lru_cache(maxsize=8)  # a command plans the same graph for several devices, budgets and batches
def _analysed(
    serialised: bytes,
    inlined: tuple[tuple[str, str], ...],
    skip: frozenset[str],
    multiple_of: tuple[tuple[str, int], ...],
    scratch: tuple[tuple[str, int], ...],
) -> Activations:
    probe = onnx.ModelProto.FromString(serialised)
    shapes = [value.type.tensor_type.shape.dim for value in probe.graph.input]
    scale = dict.fromkeys((dim.dim_param for shape in shapes for dim in shape if dim.dim_param), 1)
    scale |= {name: factor for name, factor in multiple_of if name in scale}
    dims = {name: (PROBES[0] * factor, PROBES[1] * factor) for name, factor in scale.items()}
    for tensor in probe.graph.initializer:
        probe.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    del probe.graph.initializer[:]
    if inlined:
        probe = onnx.inliner.inline_selected_functions(probe, list(inlined), exclude=False)
    found = [_sizes(probe, dict(zip(dims, point, strict=True))) for point in product(*dims.values())]
    sizes = {name: tuple(part[name] for part in found) for name in found[0] if name not in skip}

    # A kernel's own memory is a tensor that lives for its step alone.
    worked = dict(scratch)
    factors = {name: worked.get(node.op_type, 0) for node in probe.graph.node for name in node.output[:1]}
    own = {name: f"{name}.scratch" for name, factor in factors.items() if factor and name in sizes}
    sizes |= {own[name]: tuple(factors[name] * size for size in sizes[name]) for name in own}

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
