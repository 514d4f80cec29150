"""Packages with int4 and int8 weights: what is stored, and what the engine makes of it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from converted_checkpoints import tensors
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from support import build, copy_package, initializers, keep_inputs_exact, make_checkpoint

from trimkv_export.backends.native import find_library, has_quantized_kernels
from trimkv_export.build import builder as build_module
from trimkv_export.config import BuildOptions, HeadWeights, Precision, Quantization
from trimkv_export.errors import CheckpointError
from trimkv_export.package import Package
from trimkv_export.plan.planner import plan_model
from trimkv_export.quantization.calibration import Calibrated, calibrate
from trimkv_export.quantization.rounding import Adjustment, quantize
from trimkv_export.runtime import Engine
from trimkv_export.verify.selfcheck import check_engine

HEAD = ("model.embed_tokens.weight", "lm_head.weight")
FORMS: list[dict[str, Any]] = [
    {"precision": "int4"},
    {"precision": "int4", "symmetric": False, "block_size": 64},
    {"precision": "int8", "head": "float"},
    {"precision": "int4", "activations": Precision.FP16},
]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose layers divide into blocks of 64."""
    return make_checkpoint(
        tmp_path_factory.mktemp("wide"), hidden=64, intermediate=192, heads=4, kv_heads=2, head_dim=16
    )


# Of the packages of `quantized`, by their folders: how much the columns of each matrix count.
MEASURED: dict[Path, Mapping[str, Adjustment]] = {}


@pytest.fixture(scope="module", params=FORMS, ids=str)
def quantized(wide: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Package:
    output = tmp_path_factory.mktemp("quantized") / "package"
    MEASURED[output] = {}

    def measured(*arguments: Any, **more: Any) -> Calibrated:
        found = calibrate(*arguments, **more)
        MEASURED[output] = found.adjustments
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_module, "calibrate", measured)
        build(wide, output, **request.param)
    return Package.open(output)


def test_what_is_stored(quantized: Package, wide: Path) -> None:
    form, found = quantized.config.quantization, initializers(quantized.path)
    assert form is not None
    expected: dict[str, NDArray[Any]] = {}
    for name, tensor in tensors(wide).items():
        if not name.endswith("_proj.weight") and not (form.head and name in HEAD):
            expected[name] = tensor.astype(found[name].dtype)
            continue
        one = form.of_bits(form.head_bits) if name in HEAD else form
        counted = MEASURED[quantized.path].get(name, Adjustment())
        assert (counted.importance is None) == (form.bits == 8 or name in HEAD)
        assert [counted.rows, counted.columns, counted.parts] == [None] * 3
        parts = quantize(np.asarray(tensor, np.float32), one, np.dtype(np.float16), counted.importance)
        stem = name.removesuffix("weight")
        expected |= {f"{stem}{kind}": part for kind, part in parts.items()}
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.tobytes() == expected[name].tobytes(), name


def test_sizes_are_as_planned(quantized: Package, wide: Path) -> None:
    form = quantized.config.quantization
    assert form is not None
    options = BuildOptions(
        model=str(wide / "base"), gates=str(wide / "gates"), output=Path("x"), budget=8, device="l4",
        precision=Precision(f"int{form.bits}"), activations=quantized.config.precision, block_size=form.block_size,
        symmetric=form.symmetric, head=None if form.head else HeadWeights.FLOAT,
    )  # fmt: skip
    assert plan_model(options.plan_options()).plan.weight_bytes == quantized.config.weight_bytes


def test_the_engine_computes_what_the_numbers_stand_for(
    quantized: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if quantized.config.precision is not Precision.FP32:
        with Engine.open(quantized.path) as engine:
            assert check_engine(engine).passed
        return
    for native in ("auto", "off"):
        with Engine.open(quantized.path, native=native) as engine:
            assert check_engine(engine).passed
    exact = copy_package(quantized.path, tmp_path / "exact")
    keep_inputs_exact(exact, monkeypatch)
    for native in ("auto", "off"):
        with Engine.open(exact, native=native) as engine:
            report = check_engine(engine)
        assert report.kept_mismatches == 0
        assert report.max_logit_difference < 2e-4


def test_which_kernels_run(quantized: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's, with activations in float32 and on a processor that it has some for; else ONNX Runtime's."""
    made = onnxruntime.SessionOptions

    def profiled() -> onnxruntime.SessionOptions:
        options = made()
        options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
        return options

    monkeypatch.setattr(onnxruntime, "SessionOptions", profiled)
    library = find_library()
    for native in ("off", "auto"):
        with Engine.open(quantized.path, native=native) as engine:
            engine.session().step([1, 2, 3])
            events = json.loads(Path(engine.backend.end_profiling()).read_text())
        found = {event["args"]["op_name"] for event in events if event.get("args", {}).get("op_name")}
        ours = native == "auto" and has_quantized_kernels(library) and quantized.config.precision is Precision.FP32
        assert ({"QuantizedLinear", "QuantizedLinear2", "QuantizedLinear3"} <= found) == ours
        assert ("MatMulNBits" in found) != ours


def test_values_too_large_for_the_scales(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", hidden=64, intermediate=192, heads=4, kv_heads=2, head_dim=16)
    file, name = checkpoint / "base" / "model.safetensors", "model.layers.1.self_attn.o_proj.weight"
    stored = dict(load_file(file))
    stored[name][2, 1] = 2.0**23
    save_file(stored, file)
    said = rf"{name} has values up to 8.38861e\+06, too large for scales in float16.*--precision fp32"
    with pytest.raises(CheckpointError, match=said):
        build(checkpoint, tmp_path / "package", precision="int4")
    assert not (tmp_path / "package").exists()


def test_the_config_says_how(quantized: Package) -> None:
    config = quantized.config
    assert config == Package.open(quantized.path).config
    assert isinstance(config.quantization, Quantization)
    form = config.quantization
    assert form.per_row == (form.bits == 8)
    scales = "with one scale a row" if form.per_row else f"in blocks of {form.block_size}"
    zeros = "" if form.symmetric else ", with zero points"
    head = ", head in int8" if form.bits == 4 else ""
    assert form.head_bits == (8 if form.bits == 4 else None)
    assert config.numbers == f"int{form.bits} weights {scales}{zeros}{head}, else {config.precision}"
    assert config.quantization_method is not None
    assert config.quantization_method.name == "least-squares"
