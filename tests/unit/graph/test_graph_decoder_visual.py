"""The decoder graph of a model that sees: against transformers, with visual runs cut by steps, and with none."""

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from support import KERNELS
from visual_harness import VisualDecoder, visual_graph, visual_spec

from trimkv_export.backends.native import find_library
from trimkv_export.config import FLOATS, Precision
from trimkv_export.graph.check import check_graph

TYPES = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
MODELS: list[dict[str, Any]] = [
    {},
    {"tied": True, "deepstack": 3},
    {"heads": 3, "kv_heads": 1, "section": (1, 2, 2), "deepstack": 1},
    {"heads": 2, "kv_heads": 2, "section": (5, 0, 2), "deepstack": 0, "tied": True},
    {"heads": 6, "kv_heads": 3, "section": (0, 3, 0), "bias": True, "kind": "rg"},
    {"layers": 1, "deepstack": 1, "section": (1, 0, 0)},
]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("model", range(len(MODELS)))
def test_logits_are_those_of_transformers(model: int, kernels: str) -> None:
    decoder = VisualDecoder(model, native=kernels == "native", **MODELS[model])
    for visual in (None, range(3, 17), [0], [21], []):
        prompt = decoder.prompt(22, visual if visual is None else list(visual))
        expected = decoder.reference(prompt)
        decoder.reset()
        start = 0
        while start < 22:
            end = min(22, start + int(decoder.rng.integers(1, 7)))
            found = decoder.step(prompt.part(start, end))
            np.testing.assert_allclose(found[0], expected[end - 1], atol=1e-4)
            start = end
    assert np.abs(expected).max() > 1


@pytest.mark.parametrize("changed", ["position", "embeds", "deepstack"])
def test_every_input_counts(changed: str) -> None:
    """Each axis of the positions, each visual token and each DeepStack layer: else the comparison above proves less."""
    decoder = VisualDecoder(1)
    prompt = decoder.prompt(9)
    whole = decoder.step(prompt)
    values = getattr(prompt, changed)
    for index in range(len(values)):
        other = values.copy()
        other[index] *= 2
        decoder.reset()
        assert np.abs(decoder.step(replace(prompt, **{changed: other})) - whole).max() > 1e-3


@pytest.mark.skipif(find_library() is None, reason="not built: make plugins")
def test_rows_with_and_without_visual_tokens() -> None:
    decoder = VisualDecoder(5, rows=4, native=True)
    prompts = [decoder.prompt(14), decoder.prompt(14, []), decoder.prompt(14, [4]), decoder.prompt(14)]
    expected = [decoder.reference(prompt) for prompt in prompts]
    at = [0, 0, 0, 0]
    while min(at) < 14:
        ends = [min(14, start + int(decoder.rng.integers(0, 5))) for start in at]
        if ends == at:
            continue
        parts = [prompt.part(*bounds) for prompt, *bounds in zip(prompts, at, ends, strict=True)]
        found = decoder.step(*parts)
        for row, (start, end) in enumerate(zip(at, ends, strict=True)):
            if end > start:
                np.testing.assert_allclose(found[row], expected[row][end - 1], atol=1e-4)
        at = ends


@pytest.mark.parametrize("kernels", KERNELS)
def test_text_alone_is_the_text_family(kernels: str) -> None:
    """The same weights with ordinary RoPE, no visual inputs: bit for bit the same logits and state."""
    native = kernels == "native"
    spec = visual_spec()
    text = replace(spec, rope=replace(spec.rope, axes=None), takes_visual_inputs=False, deepstack_layers=0)
    seeing, reading = VisualDecoder(3, native=native), VisualDecoder(3, native=native, spec=text)
    start = 0
    for count in (5, 1, 1, 3, 1):
        part = seeing.prompt(count, [])
        part.position[:] = np.arange(start, start + count)
        feed = reading.feed([part])
        feed["position_ids"] = feed["position_ids"][0]
        del feed["visual_index"], feed["visual_embeds"]
        logits, *state = reading.session.run(None, feed | reading.state)
        reading.state = dict(zip(reading.state, state, strict=True))
        np.testing.assert_array_equal(seeing.step(part), logits)
        for name, array in seeing.state.items():
            np.testing.assert_array_equal(array, reading.state[name], err_msg=name)
        start += count


def test_no_visual_tokens_bound_in_place() -> None:
    """A decode step as the runtime runs it: every buffer bound once, the visual ones empty."""
    decoder, copied = VisualDecoder(2), VisualDecoder(2)
    prompt = decoder.prompt(6, [])
    binding, logits = decoder.session.io_binding(), np.zeros((1, 40), np.float32)
    feed = decoder.feed([prompt.part(0, 1)])
    for name, array in (feed | decoder.state).items():
        binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    for name, array in decoder.state.items():
        target = name.replace("past", "present")
        binding.bind_output(target, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    binding.bind_output("logits", "cpu", 0, logits.dtype, logits.shape, logits.ctypes.data)
    assert [feed[name].shape for name in feed if "visual" in name or "deep" in name] == [(0,), (0, 20), (2, 0, 20)]
    for index in range(6):
        feed["input_ids"][...] = prompt.tokens[index]
        feed["position_ids"][:, 0, 0] = prompt.position[:, index]
        decoder.session.run_with_iobinding(binding)
        np.testing.assert_array_equal(logits, copied.step(prompt.part(index, index + 1)))


@pytest.mark.parametrize("kernels", KERNELS)
def test_half_precision_is_near(kernels: str) -> None:
    half = VisualDecoder(4, precision=Precision.FP16, native=kernels == "native")
    prompt = half.prompt(10)
    expected = half.reference(prompt)
    for start, end in ((0, 4), (4, 9), (9, 10)):
        np.testing.assert_allclose(half.step(prompt.part(start, end))[0], expected[end - 1], atol=0.05)


@pytest.mark.parametrize("precision", FLOATS)
@pytest.mark.parametrize("deepstack", [0, 3])
def test_checker_and_strict_shape_inference_pass(precision: Precision, deepstack: int) -> None:
    graph = visual_graph(precision=precision, deepstack=deepstack)
    check_graph(graph.model)
    onnx.shape_inference.infer_shapes(graph.model, check_type=True, strict_mode=True, data_prop=True)


@pytest.mark.parametrize("precision", FLOATS)
@pytest.mark.parametrize("deepstack", [0, 2])
def test_inputs(precision: Precision, deepstack: int) -> None:
    def describe(value: onnx.ValueInfoProto) -> tuple[str, int, list[object]]:
        kind = value.type.tensor_type
        return value.name, kind.elem_type, [dim.dim_param or dim.dim_value for dim in kind.shape.dim]

    graph, kind = visual_graph(precision=precision, deepstack=deepstack).model.graph, TYPES[precision]
    features = [("deepstack_embeds", kind, [deepstack, "visual", 20])] if deepstack else []
    assert [describe(value) for value in graph.input if not value.name.startswith("past.")] == [
        ("input_ids", 7, ["batch", "step"]),
        ("position_ids", 7, [3, "batch", "step"]),
        ("step_tokens", 6, ["batch"]),
        ("budget", 6, ["batch"]),
        ("visual_index", 7, ["visual"]),
        ("visual_embeds", kind, ["visual", 20]),
        *features,
    ]


def test_nodes_are_named_and_need_no_reduction() -> None:
    nodes = {node.name: node for node in visual_graph(deepstack=2).model.graph.node}
    layers = "model.language_model.layers."
    names = ["model.language_model.visual_embeds", f"{layers}0.deepstack", f"{layers}1.deepstack"]
    assert [name for name, node in nodes.items() if node.op_type == "ScatterND"] == names
    assert not any(nodes[name].attribute for name in names)
    assert not {"NonZero", "Loop", "If", "ScatterElements"} & {node.op_type for node in nodes.values()}


def test_initialisers_are_the_checkpoint() -> None:
    graph = visual_graph(tied=True)
    gates = {name for name in (weight.name for weight in graph.weights) if ".retention_gate." in name}
    assert gates
    assert all(name.startswith("model.language_model.layers.") for name in gates)
    assert {weight.name for weight in graph.weights} - gates == set(visual_spec(tied=True).tensors())
