"""Calibrated weights: what is measured, what is folded where, and what comes of it."""

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from converted_checkpoints import DTYPES, convert_checkpoint, tensors
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from support import GOLDEN, build, copy_package, initializers, keep_inputs_exact, make_checkpoint, random_tokens

from trimkv_export.build import builder as build_module
from trimkv_export.build import weights as weights_module
from trimkv_export.config import BuildOptions, PlanOptions, Precision, options_of
from trimkv_export.errors import CheckpointError
from trimkv_export.package import DECODER, Package
from trimkv_export.plan.planner import plan_model
from trimkv_export.quantization import calibration as calibrate_module
from trimkv_export.quantization.calibration import Calibrated
from trimkv_export.quantization.calibration_text import CalibrationText
from trimkv_export.quantization.rounding import Adjustment
from trimkv_export.runtime import Engine
from trimkv_export.verify import check_engine, compare_engines
from trimkv_export.verify.reference import ReferenceDecoder
from trimkv_export.verify.stored_weights import StoredWeights

SHAPE = {"hidden": 64, "intermediate": 128, "heads": 4, "kv_heads": 2, "head_dim": 16}
# Checkpoints of the official code whose layers divide into blocks of 32; of a family each.
FAMILIES = [case for case in GOLDEN if case.name in ("rg10_default", "qwen2_rg_default", "phi3_rg_default")]
TOKENS = random_tokens(600, vocabulary=64)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 bytes, which are as many tokens for the small checkpoints."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_bytes(bytes(32 + token for token in TOKENS))
    return file


@pytest.fixture
def adjustments(monkeypatch: pytest.MonkeyPatch) -> dict[str, Adjustment]:
    """What the next build with `calibrate` does to each tensor."""
    found: dict[str, Adjustment] = {}

    def calibrate(*arguments: Any, **more: Any) -> Calibrated:
        calibrated = calibrate_module.calibrate(*arguments, **more)
        found.update(calibrated.adjustments)
        return calibrated

    monkeypatch.setattr(build_module, "calibrate", calibrate)
    return found


def always(monkeypatch: pytest.MonkeyPatch, *, last: bool) -> None:
    """The first exponent, 0, is always the best; or the last."""
    count = itertools.count()
    monkeypatch.setattr(calibrate_module, "rounding_error", lambda *_: -float(next(count)) if last else 1.0)


def own_tokens(monkeypatch: pytest.MonkeyPatch, tokens: list[int]) -> None:
    """In place of those of the text."""
    monkeypatch.setattr(CalibrationText, "tokens", lambda *_: np.array(tokens, np.int64))


def with_outliers(checkpoint: Path) -> Path:
    """Make some channels of each norm 20 to 50 times as large, and the columns that read them as small."""
    random, file = np.random.default_rng(1), checkpoint / "base" / "model.safetensors"
    stored = dict(load_file(file))

    def multiply(name: str, channels: NDArray[np.int64], factors: NDArray[np.float64]) -> None:
        value = stored[name].astype(np.float64)
        value[..., channels] *= factors
        stored[name] = value.astype(ml_dtypes.bfloat16)

    for name in [name for name in stored if name.endswith("layernorm.weight")]:
        channels, factors = random.choice(SHAPE["hidden"], 4, replace=False), random.uniform(20, 50, 4)
        multiply(name, channels, factors)
        stem = name.rpartition(".")[0].rpartition(".")[0]
        readers = [f"self_attn.{part}_proj" for part in "qkv"]
        for reader in readers if "input" in name else ("mlp.gate_proj", "mlp.up_proj"):
            multiply(f"{stem}.{reader}.weight", channels, 3 / factors)
    save_file(stored, file)
    return checkpoint


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_outliers(make_checkpoint(tmp_path_factory.mktemp("outliers"), tie=False, **SHAPE))


@pytest.fixture(scope="module")
def floats(outliers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(outliers, tmp_path_factory.mktemp("floats") / "package", budget=64).path


def distance(package: Path, floats: Path) -> float:
    with Engine.open(package, threads=1) as engine, Engine.open(floats, threads=1) as other:
        return compare_engines(engine, other, random_tokens(64, seed=9), new_tokens=16).logit_difference


@pytest.mark.parametrize(
    "form",
    [{"precision": "int4"}, {"precision": "int4", "symmetric": False, "block_size": 64}, {"precision": "int8"}],
    ids=str,
)
@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_closer_to_floats_than_without_a_text(
    outliers: Path,
    floats: Path,
    tmp_path: Path,
    text: Path,
    form: dict[str, Any],
    method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build(outliers, tmp_path / "nearest", budget=64, **form)
    build(outliers, tmp_path / "calibrated", budget=64, calibrate=text, calibration_method=method, **form)
    assert distance(tmp_path / "calibrated", floats) < 0.7 * distance(tmp_path / "nearest", floats)
    exact = copy_package(tmp_path / "calibrated", tmp_path / "exact")
    keep_inputs_exact(exact, monkeypatch)
    with Engine.open(exact, threads=1) as engine:
        assert check_engine(engine).kept_mismatches == 0


def folded(source: Path, target: Path, adjustments: Mapping[str, Adjustment]) -> Path:
    """The checkpoint in float32 with scales multiplied in, and nothing rounded."""
    convert_checkpoint(source, target, DTYPES["fp32"])
    for folder, name in (("base", "model.safetensors"), ("gates", "trimkv_weights.safetensors")):
        stored = dict(load_file(target / folder / name))
        for tensor in stored.keys() & adjustments.keys():
            value = stored[tensor]
            rows = adjustments[tensor].apply(value.reshape(len(value), -1), 0)
            stored[tensor] = np.ascontiguousarray(rows.reshape(value.shape))
        save_file(stored, target / folder / name)
    return target


@pytest.mark.parametrize("family", FAMILIES, ids=lambda case: case.name)
def test_scales_leave_the_float_model_as_it_is(
    family: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, adjustments: dict[str, Adjustment]
) -> None:
    always(monkeypatch, last=True)
    own_tokens(monkeypatch, TOKENS)
    build(family, tmp_path / "calibrated", precision="int4", calibrate=text)
    spread = [f.max() / f.min() for a in adjustments.values() for f in (a.rows, a.columns) if f is not None]
    assert len(spread) >= 12
    assert min(spread) > 1.2
    before = build(convert_checkpoint(family, tmp_path / "plain", DTYPES["fp32"]), tmp_path / "before").path
    after = build(folded(family, tmp_path / "folded", adjustments), tmp_path / "after").path
    for name, value in initializers(after).items():
        if name in adjustments:
            assert not np.allclose(value, initializers(before)[name], rtol=0.01), name
    with Engine.open(before, threads=1) as one, Engine.open(after, threads=1) as other:
        session, reference = one.session(), other.session()
        for start in range(0, 96, 16):
            found, expected = (s.step(TOKENS[start : start + 16]) for s in (session, reference))
            np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
            np.testing.assert_array_equal(session.kept(), reference.kept())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda case: case.name)
@pytest.mark.parametrize("last", [False, True])
def test_what_is_measured(
    family: Path,
    last: bool,
    tmp_path: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    adjustments: dict[str, Adjustment],
) -> None:
    """Means over all tokens, against the NumPy decoder."""
    always(monkeypatch, last=last)
    own_tokens(monkeypatch, TOKENS[:40])
    monkeypatch.setattr(calibrate_module, "PIECE", 16)
    monkeypatch.setattr(calibrate_module, "QUIET", 0.0)
    build(family, tmp_path / "calibrated", precision="int4", calibrate=text)
    inputs: dict[str, list[NDArray[np.float32]]] = {}
    plain = StoredWeights.linear

    def linear(self: StoredWeights, x: NDArray[np.float32], module: str) -> NDArray[np.float32]:
        inputs.setdefault(f"{module}.weight", []).append(x)
        return plain(self, x, module)

    monkeypatch.setattr(StoredWeights, "linear", linear)
    package = Package.open(build(family, tmp_path / "floats").path)
    for start in range(0, 40, 16):
        ReferenceDecoder(package).step(TOKENS[:40][start : start + 16], budget=8)
    matrices = [name for name in inputs if name.endswith("_proj.weight")]
    assert len(matrices) == package.config.model.num_layers * (4 if package.config.model.fused_projections else 7)
    heads, depth = package.config.model.num_kv_heads, package.config.model.head_dim
    for name in matrices:
        x, found = np.concatenate(inputs[name]).astype(np.float64), adjustments[name]
        scales, size = np.ones(x.shape[1]), np.abs(x).mean(axis=0)
        if last:
            if "o_proj" in name:  # those of one KV head share their scales
                size = size.reshape(heads, -1, depth).mean(axis=1, keepdims=True)
                size = np.broadcast_to(size, (heads, x.shape[1] // heads // depth, depth)).ravel()
            scales = size ** max(calibrate_module.EXPONENTS)
            scales /= np.sqrt(scales.max() * scales.min())
        assert found.importance is not None
        np.testing.assert_allclose(found.importance, (x**2).mean(axis=0) / scales**2, rtol=1e-4)
        assert (found.columns is not None) is last
        if found.columns is not None:
            np.testing.assert_allclose(found.columns, scales, rtol=1e-4)


def test_a_channel_that_the_text_does_not_use(
    tmp_path: Path, text: Path, adjustments: dict[str, Adjustment], outliers: Path
) -> None:
    source = convert_checkpoint(outliers, tmp_path / "checkpoint", DTYPES["bf16"])
    file = source / "base" / "model.safetensors"
    stored = dict(load_file(file))
    stored["model.layers.1.input_layernorm.weight"][3] = 0
    stored["model.layers.2.input_layernorm.weight"][:] = 0
    save_file(stored, file)
    build(source, tmp_path / "package", precision="int4", calibrate=text)
    for adjustment in adjustments.values():
        for values in (adjustment.rows, adjustment.columns, adjustment.importance):
            assert values is None or (np.isfinite(values).all() and (values > 0).all())
    # It could not be told from a channel a hundred times smaller than the others.
    factors = adjustments["model.layers.1.self_attn.q_proj.weight"].columns
    assert factors is not None
    assert factors.max() / factors.min() < 1e4


def test_activations_that_are_not_finite(tmp_path: Path, text: Path, outliers: Path) -> None:
    source = convert_checkpoint(outliers, tmp_path / "checkpoint", DTYPES["bf16"])
    file = source / "base" / "model.safetensors"
    stored = dict(load_file(file))
    stored["model.layers.1.post_attention_layernorm.weight"][:] = 3e38
    save_file(stored, file)
    with pytest.raises(CheckpointError, match=r"input of model.layers.1.mlp.gate_proj.weight is not finite"):
        build(source, tmp_path / "package", precision="int4", calibrate=text)
    assert not (tmp_path / "package").exists()


@pytest.mark.parametrize("tie", [False, True])
def test_the_head(tmp_path: Path, text: Path, adjustments: dict[str, Adjustment], tie: bool) -> None:
    """One of its own gets scales; one that is the embedding, too, is rounded to nearest."""
    source = make_checkpoint(tmp_path / "checkpoint", tie=tie, **SHAPE)
    build(source, tmp_path / "calibrated", precision="int4", calibrate=text)
    build(source, tmp_path / "nearest", precision="int4")
    calibrated, nearest = initializers(tmp_path / "calibrated"), initializers(tmp_path / "nearest")
    assert ("lm_head.weight" in adjustments) is not tie
    np.testing.assert_array_equal(calibrated["model.embed_tokens.qweight"], nearest["model.embed_tokens.qweight"])
    adjustments.clear()
    build(source, tmp_path / "floats", precision="int4", calibrate=text, head="float")
    assert "lm_head.weight" not in adjustments
    assert "model.norm.weight" not in adjustments


def test_reads_in_small_parts_make_the_same_package(
    outliers: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"precision": "int4", "activations": "fp16", "calibrate": text}
    whole = build(outliers, tmp_path / "whole", **options)
    monkeypatch.setattr(weights_module, "CHUNK_BYTES", 1000)
    assert build(outliers, tmp_path / "parts", **options).config == whole.config
    with Engine.open(tmp_path / "parts", threads=1) as engine:
        assert check_engine(engine).passed


@pytest.mark.usefixtures("tensorrt")
@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_for_tensorrt_positive_scales(outliers: Path, tmp_path: Path, text: Path, method: str) -> None:
    """Its kernels want them; so the values are no longer those of the other target, and hardly worse."""
    options: dict[str, Any] = {
        "precision": "int4", "block_size": 64, "activations": "fp16", "head": "float", "calibrate": text,
        "calibration_method": method,
    }  # fmt: skip
    values = []
    for target in ("onnxruntime", "tensorrt"):
        package = Package.open(build(outliers, tmp_path / target, target=target, **options).path)
        scales = [value for name, value in initializers(package.path).items() if name.endswith("_proj.scales")]
        assert all((each > 0).all() for each in scales) == (target == "tensorrt")
        read = StoredWeights(package.path, DECODER, package.config.quantization).read
        values.append(np.concatenate([read(name).ravel() for name in tensors(outliers)]))
    assert np.corrcoef(values)[0, 1] > 0.98


def test_progress_counts_every_token_in_every_layer(outliers: Path, tmp_path: Path, text: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    options = BuildOptions(
        str(outliers / "base"), 8, gates=str(outliers / "gates"), output=tmp_path / "package",
        precision=Precision.INT4, calibrate=text,
    )  # fmt: skip
    build_module.build_package(options, lambda *step: seen.append(step))
    assert [step for step in seen if step[0] == "calibration"] == [
        ("calibration", done, 1800) for done in (512, 600, 1112, 1200, 1712, 1800)
    ]


def test_the_config_says_how(outliers: Path, tmp_path: Path, text: Path) -> None:
    build(outliers, tmp_path / "calibrated", precision="int4", calibrate=text)
    found = Package.open(tmp_path / "calibrated").config.quantization_method
    assert found is not None
    assert (found.name, found.text_tokens, found.int8) == ("awq", 600, None)
    assert found.text_sha256 == hashlib.sha256(text.read_bytes()).hexdigest()


@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_most_harmed_matrices_are_in_int8(
    outliers: Path,
    floats: Path,
    tmp_path: Path,
    text: Path,
    method: str,
    symmetric: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: dict[str, Any] = {
        "precision": "int4", "calibrate": text, "calibration_method": method, "symmetric": symmetric, "budget": 64
    }  # fmt: skip
    build(outliers, tmp_path / "int4", **options)
    report = build(outliers, tmp_path / "mixed", mixed=6.0, **options)
    package = Package.open(report.path)
    method_found, form = package.config.quantization_method, package.config.quantization
    assert method_found is not None
    assert form is not None
    assert method_found.int8
    assert f"{len(method_found.int8)} matrices in int8" in package.config.numbers
    stored = initializers(report.path)
    wide, total, weights = [], 0, 0
    for name in [name for name in tensors(outliers) if name.endswith("_proj.weight")]:
        parts = [
            stored[name.removesuffix("weight") + kind] for kind in ("qweight", "scales", "qzeros")[: 3 - symmetric]
        ]
        if parts[0].shape[-1] == form.block_size:
            wide.append(name)
        total += 8 * sum(part.nbytes for part in parts)
        weights += int(np.prod(tensors(outliers)[name].shape))
    assert wide == sorted(method_found.int8)
    assert 5.5 < total / weights <= 6
    planned = replace(plan_options(outliers, **options), mixed=6.0)
    planned_bytes = plan_model(planned).plan.weight_bytes
    assert 0 <= planned_bytes - package.config.weight_bytes < 0.5 / 8 * weights
    assert distance(tmp_path / "mixed", floats) < distance(tmp_path / "int4", floats)
    exact = copy_package(report.path, tmp_path / "exact")
    keep_inputs_exact(exact, monkeypatch)
    for native in ("auto", "off"):
        with Engine.open(exact, threads=1, native=native) as engine:
            found = check_engine(engine)
        assert found.kept_mismatches == 0
        assert found.max_logit_difference < 1e-3


def plan_options(checkpoint: Path, **options: Any) -> PlanOptions:
    known = {option.name for option in options_of(PlanOptions)}
    return PlanOptions(
        str(checkpoint / "base"), gates=str(checkpoint / "gates"), activations=Precision.FP32,
        **{name: value for name, value in options.items() if name in known}, device="l4",
    )  # fmt: skip


def test_harm_is_that_of_the_layer(outliers: Path, tmp_path: Path, text: Path) -> None:
    """A matrix that does nothing harms nothing, and is the last to become int8."""
    source = convert_checkpoint(outliers, tmp_path / "checkpoint", DTYPES["bf16"])
    file = source / "base" / "model.safetensors"
    stored = dict(load_file(file))
    quiet = "model.layers.1.mlp.up_proj.weight"
    stored["model.layers.1.mlp.gate_proj.weight"][:] = 0
    save_file(stored, file)
    for mixed, inside in ((8.2, False), (9.0, True)):
        build(source, tmp_path / str(mixed), precision="int4", calibrate=text, mixed=mixed)
        method = Package.open(tmp_path / str(mixed)).config.quantization_method
        assert method is not None
        assert (quiet in (method.int8 or ())) is inside


def test_nothing_of_what_was_rounded_is_left_behind(outliers: Path, tmp_path: Path, text: Path) -> None:
    report = build(outliers, tmp_path / "package", precision="int4", calibrate=text, calibration_method="gptq")
    assert not [file for file in report.path.iterdir() if file.is_dir()]
    assert set(Package.open(report.path).config.files) == {
        file.name for file in report.path.iterdir() if file.name != "config.json"
    }
