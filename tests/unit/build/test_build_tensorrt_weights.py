"""Packages with int4 and int8 weights for TensorRT, built with a stand-in for it (tests/fake_tensorrt.py)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from converted_checkpoints import tensors
from numpy.typing import NDArray
from quantized_checkpoints import LAYOUTS, quantize_checkpoint
from safetensors.numpy import load_file, save_file
from support import build, keep_inputs_exact, make_checkpoint, random_tokens

from trimkv_export.build import weights
from trimkv_export.build.tensorrt import EngineBuilder
from trimkv_export.config import PlanOptions, Precision, Quantization, Target
from trimkv_export.errors import CheckpointError, OptionError
from trimkv_export.package import DECODER, Package
from trimkv_export.plan.planner import plan_model
from trimkv_export.quantization import rounding
from trimkv_export.quantization.rounding import Rounding, block_scales, chosen_quantization, quantize
from trimkv_export.runtime import Engine
from trimkv_export.verify import check_engine
from trimkv_export.verify.stored_weights import StoredWeights

pytestmark = pytest.mark.usefixtures("tensorrt")

SHAPE = {"hidden": 128, "intermediate": 256, "heads": 4, "kv_heads": 2, "head_dim": 32}
FORMS: list[dict[str, Any]] = [
    {"precision": "int4", "block_size": 128}, {"precision": "int4", "block_size": 64, "head": "float"},
    {"precision": "int8"},
]  # fmt: skip


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def checkpoint(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("wide"), tie=request.param, **SHAPE)


def built(checkpoint: Path, output: Path, **changes: Any) -> Package:
    build(checkpoint, output, **changes)
    return Package.open(output)


def positive(blocks: NDArray[np.float32], form: Quantization, *more: Any) -> Any:
    return block_scales(blocks, replace(form, qdq=True), *more)


def with_scales_as_floats(*of: Any) -> Quantization:
    found = chosen_quantization(*of)
    assert found is not None
    return replace(found, scale_dtype=None)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_engine_computes_what_the_numbers_stand_for(checkpoint: Path, tmp_path: Path, form: dict[str, Any]) -> None:
    """ONNX Runtime on the graph with DequantizeLinear, against NumPy on the stored numbers."""
    package = built(checkpoint, tmp_path / "package", target="tensorrt", activations="fp32", **form)
    assert package.config.quantization is not None
    assert package.config.quantization.qdq
    assert not {"com.microsoft"} & {opset.domain for opset in onnx.load(package.path / DECODER).opset_import}
    for native in ("auto", "off"):
        with Engine.open(package.path, native=native) as engine:
            assert check_engine(engine).passed


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_values_are_those_of_the_other_operators(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: dict[str, Any]
) -> None:
    """The same logits as MatMulNBits, its inputs not rounded; there the embedding would be quantised with the head."""
    form = form | {"head": "float", "activations": "fp32"}
    ours = built(checkpoint, tmp_path / "ours", target="tensorrt", **form)
    # With the same scales: they would be in float16.
    monkeypatch.setattr("trimkv_export.build.builder.chosen_quantization", with_scales_as_floats)
    # And above 0, which they need not be.
    monkeypatch.setattr(rounding, "block_scales", positive)
    theirs = built(checkpoint, tmp_path / "theirs", **form)
    keep_inputs_exact(theirs.path, monkeypatch)
    tokens = random_tokens(40)
    with Engine.open(ours.path) as one, Engine.open(theirs.path) as other:
        session, reference = one.session(), other.session()
        for step in (tokens[:16], tokens[16:], [7], [8]):
            np.testing.assert_allclose(session.prefill(step), reference.prefill(step), atol=1e-5)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_sizes_are_as_planned(checkpoint: Path, tmp_path: Path, form: dict[str, Any]) -> None:
    for target in (Target.TENSORRT, Target.ONNXRUNTIME):
        package = built(checkpoint, tmp_path / target, target=target, activations="fp16", **form)
        options = PlanOptions(
            model=str(checkpoint / "base"), gates=str(checkpoint / "gates"), budget=8, device="l4", target=target,
            activations=Precision.FP16, **form,
        )  # fmt: skip
        made = plan_model(options)
        assert made.plan.weight_bytes == package.config.weight_bytes
        data = sum(file["bytes"] for name, file in package.config.files.items() if name.endswith(".data"))
        assert 0 <= data - package.config.weight_bytes < 64 * 200  # nothing but alignment is there beside it
        floats = plan_model(PlanOptions(options.model, 8, gates=options.gates, target=target))
        assert made.workload.parameters == floats.workload.parameters


def test_activations_default_to_fp16(checkpoint: Path, tmp_path: Path) -> None:
    package = built(checkpoint, tmp_path / "package", target="tensorrt", precision="int4", block_size=64)
    assert package.config.precision is Precision.FP16
    assert package.config.numbers == "int4 weights in blocks of 64, head in int8, else fp16"
    with Engine.open(package.path) as engine:
        assert check_engine(engine).passed


@pytest.mark.parametrize("activations", ["bf16", "fp16"])
def test_a_tied_matrix_is_read_for_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, activations: str) -> None:
    """As embedding it is in the checkpoint's own file, or is converted like the head; in many chunks."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", tie=True, **SHAPE)
    monkeypatch.setattr(weights, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(EngineBuilder, "build", lambda *_: None)  # the stand-in runs no bf16
    package = built(
        checkpoint, tmp_path / "package", target="tensorrt", precision="int4", block_size=128, activations=activations
    )
    form, stored = package.config.quantization, StoredWeights(package.path, DECODER, package.config.quantization)
    table, head = stored.read("model.embed_tokens.weight"), stored.read("lm_head.weight")
    np.testing.assert_allclose(table, tensors(checkpoint)["model.embed_tokens.weight"].astype(np.float32), atol=1e-4)
    assert form is not None
    scales = quantize(table, form, np.dtype(package.config.precision.dtype))["scales"].astype(np.float32)
    assert (np.abs(table - head) < 0.52 * scales).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precision": "int4"}, r"int4 with blocks of 32, without zero points, does not run on TensorRT, which takes "
         r"int4 in blocks of 64 or 128 .*; build with --precision int4 --symmetric --block-size 128, or"),
        ({"precision": "int4", "block_size": 128, "symmetric": False}, "int4 with blocks of 128, with zero points, "),
        ({"precision": "int8", "symmetric": False}, "int8 with one scale a row, with zero points, does not run"),
    ],
)  # fmt: skip
def test_what_tensorrt_does_not_run(checkpoint: Path, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        build(checkpoint, tmp_path / "package", target="tensorrt", **options)
    assert not (tmp_path / "package").exists()
    with pytest.raises(OptionError, match=said):
        plan_model(
            PlanOptions(str(checkpoint / "base"), 8, gates=str(checkpoint / "gates"), target=Target.TENSORRT, **options)
        )


class TestCheckpointsThatAreQuantisedAlready:
    def layout(self, monkeypatch: pytest.MonkeyPatch, **options: Any) -> str:
        how = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64} | options
        group = {"targets": ["Linear"], "weights": how, "input_activations": None}
        monkeypatch.setitem(LAYOUTS, "mine", LAYOUTS["compressed"] | {"config_groups": {"group_0": group}})
        return "mine"

    @pytest.mark.parametrize(
        "layout", [{}, {"group_size": 128}, {"num_bits": 8, "strategy": "channel", "group_size": -1}], ids=str
    )
    def test_come_in_bit_for_bit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: dict[str, Any]) -> None:
        checkpoint = make_checkpoint(tmp_path / "checkpoint", **SHAPE)
        values = quantize_checkpoint(checkpoint, self.layout(monkeypatch, **layout))
        precision = f"int{layout.get('num_bits', 4)}"
        package = built(checkpoint, tmp_path / "package", target="tensorrt", precision=precision, activations="fp32")
        stored = StoredWeights(package.path, DECODER, package.config.quantization)
        for name, value in values.items():
            np.testing.assert_array_equal(stored.read(name), value, name)
        with Engine.open(package.path) as engine:
            assert check_engine(engine).passed

    def gptq(self, monkeypatch: pytest.MonkeyPatch) -> str:
        """GPTQ that says `sym`."""
        monkeypatch.setitem(LAYOUTS, "sym", {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True})
        return "sym"

    def test_gptq_without_its_zero_points(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        checkpoint = make_checkpoint(tmp_path / "checkpoint", **SHAPE)
        values = quantize_checkpoint(checkpoint, self.gptq(monkeypatch))
        package = built(checkpoint, tmp_path / "package", target="tensorrt", precision="int4", activations="fp32")
        assert package.config.quantization is not None
        assert package.config.quantization.symmetric
        stored = StoredWeights(package.path, DECODER, package.config.quantization)
        for name, value in values.items():
            np.testing.assert_array_equal(stored.read(name), value, name)
        options = PlanOptions(
            str(checkpoint / "base"), 8, gates=str(checkpoint / "gates"), target=Target.TENSORRT, device="l4",
            precision=Precision.INT4, activations=Precision.FP32,
        )  # fmt: skip
        assert plan_model(options).plan.weight_bytes == package.config.weight_bytes

    def test_zero_points_that_are_not_as_said(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        checkpoint = make_checkpoint(tmp_path / "checkpoint", **SHAPE)
        quantize_checkpoint(checkpoint, self.gptq(monkeypatch), middle=False)
        said = (
            r"qzeros has a zero point of \d+, though config.json says that all are 8 \(sym\): the two are of different"
        )
        with pytest.raises(CheckpointError, match=said):
            built(checkpoint, tmp_path / "package", target="tensorrt", precision="int4")
        assert not (tmp_path / "package").exists()

    @pytest.mark.parametrize("scale", [0.0, -0.25])
    def test_scales_that_are_not_above_zero(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: float
    ) -> None:
        checkpoint = make_checkpoint(tmp_path / "checkpoint", **SHAPE)
        quantize_checkpoint(checkpoint, self.layout(monkeypatch))
        file = checkpoint / "base" / "model.safetensors"
        stored = dict(load_file(file))
        stored["model.layers.1.mlp.up_proj.weight_scale"][2, 1] = scale
        save_file(stored, file)
        with pytest.raises(CheckpointError, match=f"up_proj.weight_scale has a scale of {scale:g}, and TensorRT takes"):
            built(checkpoint, tmp_path / "package", target="tensorrt", precision="int4")

    @pytest.mark.parametrize("layout", ["awq", "gptq", "compressed"])
    def test_are_refused_in_other_formats(self, tmp_path: Path, layout: str) -> None:
        checkpoint = make_checkpoint(tmp_path / "checkpoint", **SHAPE)
        quantize_checkpoint(checkpoint, layout)
        zeros = "without" if layout == "compressed" else "with"
        said = (
            rf"int4 with blocks of 32, {zeros} zero points.*take the original of this checkpoint \(.*\) and build with"
        )
        with pytest.raises(OptionError, match=said):
            build(checkpoint, tmp_path / "package", target="tensorrt", precision="int4")


@pytest.mark.parametrize("form", [Quantization(4, 64), Quantization(8, 64, per_row=True)])
def test_signed_numbers_and_positive_scales(form: Quantization) -> None:
    """ONNX's own definition of DequantizeLinear gives the values that the unsigned numbers stand for."""
    rows = np.random.default_rng(0).standard_normal((4, 128)).astype(np.float32)
    rows[1], rows[2, :64], rows[3] = 0, 0, 1e-30
    scale = np.dtype(np.float16)
    ours = quantize(rows, Quantization(form.bits, 64, form.per_row, qdq=True), scale)
    assert (ours["scales"].astype(np.float32) > 0).all()
    kind = {4: onnx.TensorProto.INT4, 8: onnx.TensorProto.INT8}[form.bits]
    scales = ours["scales"][:, 0] if form.per_row else ours["scales"]
    blocks: dict[str, Any] = {"axis": 0} if form.per_row else {"axis": 1, "block_size": 64}
    node = onnx.helper.make_node("DequantizeLinear", ["w", "s"], ["y"], **blocks)
    graph = onnx.helper.make_graph(
        [node], "g", [], [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT16, [4, 128])],
        [onnx.helper.make_tensor("w", kind, [4, 128], ours["qweight"].tobytes(), raw=True),
         onnx.numpy_helper.from_array(scales, "s")],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=11)
    found = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {})[0]
    values = Rounding.of(rows, Quantization(form.bits, 64, form.per_row, qdq=True), scale).values().astype(scale)
    np.testing.assert_array_equal(found, values.reshape(4, 128))
