"""Checkpoints that are quantised already come into a package bit for bit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantized_checkpoints import LAYOUTS, quantize_checkpoint
from safetensors.numpy import load_file, save_file
from support import build, make_checkpoint

from trimkv_export.config import HeadWeights, PlanOptions, Precision
from trimkv_export.errors import CheckpointError, OptionError, UnsupportedModelError
from trimkv_export.package import DECODER, Package, QuantizationMethod
from trimkv_export.plan.planner import plan_model
from trimkv_export.runtime import Engine
from trimkv_export.verify import check_engine
from trimkv_export.verify.stored_weights import StoredWeights

SHAPE = {"hidden": 128, "intermediate": 256, "heads": 4, "kv_heads": 2, "head_dim": 32}


def bits_of(layout: str) -> str:
    return "int8" if layout.endswith("8") else "int4"


@pytest.mark.parametrize("head", [None, *HeadWeights])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_are_those_of_the_checkpoint(tmp_path: Path, layout: str, head: HeadWeights | None) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **SHAPE)
    values = quantize_checkpoint(checkpoint, layout)
    build(checkpoint, tmp_path / "package", precision=bits_of(layout), head=head)
    package = Package.open(tmp_path / "package")
    stored = StoredWeights(package.path, DECODER, package.config.quantization)
    assert len(values) == 7 * package.config.model.num_layers
    for name, value in values.items():
        np.testing.assert_array_equal(stored.read(name), value, name)
    assert package.config.quantization is not None
    assert package.config.quantization.head is (head not in (None, HeadWeights.FLOAT))
    options = PlanOptions(
        model=str(checkpoint / "base"), gates=str(checkpoint / "gates"), budget=8, device="l4", head=head,
        precision=Precision(bits_of(layout)), activations=Precision.FP32,
    )  # fmt: skip
    assert plan_model(options).plan.weight_bytes == package.config.weight_bytes


def test_the_engine_runs_it(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **SHAPE)
    quantize_checkpoint(checkpoint, "awq")
    build(checkpoint, tmp_path / "package", precision="int4")
    with Engine.open(tmp_path / "package") as engine:
        assert check_engine(engine).passed


def test_negative_scales_are_ordinary(tmp_path: Path) -> None:
    """AutoRound writes them."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **SHAPE)
    name = "model.layers.0.self_attn.q_proj"
    value = quantize_checkpoint(checkpoint, "gptq")[f"{name}.weight"]
    edit(checkpoint, f"{name}.scales", lambda scales: -scales)
    build(checkpoint, tmp_path / "package", precision="int4")
    package = Package.open(tmp_path / "package")
    assert package.config.quantization_method == QuantizationMethod("imported-gptq")
    stored = StoredWeights(package.path, DECODER, package.config.quantization)
    np.testing.assert_array_equal(stored.read(f"{name}.weight"), -value)
    with Engine.open(package.path) as engine:
        assert check_engine(engine).passed


def changed(tmp_path: Path, layout: str, **changes: Any) -> Path:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **SHAPE)
    quantize_checkpoint(checkpoint, layout)
    file = checkpoint / "base" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= changes
    file.write_text(json.dumps(config))
    return checkpoint


@pytest.mark.parametrize(
    ("layout", "changes", "said"),
    [
        (
            "awq",
            {"quant_method": "bitsandbytes"},
            "'bitsandbytes' is not supported; supported: awq, compressed",
        ),
        ("awq", {"version": "gemv"}, "version 'gemv' is not supported; supported: gemm"),
        ("awq", {"bits": 3}, "bits 3 is not supported; supported: 4, 8"),
        ("gptq", {"desc_act": True}, "desc_act True is not supported; supported: False"),
        ("gptq", {"group_size": 100}, "group_size 100 is not supported; supported: -1, 16, 32, 64, 128, 256"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported"),
        ("compressed", {"format": "float-quantized"}, "format 'float-quantized' is not supported"),
        ("compressed", {"config_groups": {}}, "config_groups {} is not supported; supported: one group of layers"),
    ],
)
def test_other_layouts_are_refused_by_name(tmp_path: Path, layout: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        build(changed(tmp_path, layout, **changes), tmp_path / "package", precision="int4")


def test_never_quantised_twice_nor_back(tmp_path: Path) -> None:
    checkpoint = changed(tmp_path, "gptq")
    said = r"quantised to int4 already \(gptq\); build it with --precision int4, or take the original for "
    for precision in ("fp32", "int8"):
        with pytest.raises(OptionError, match=said + precision):
            build(checkpoint, tmp_path / "package", precision=precision)
    assert not (tmp_path / "package").exists()


def edit(checkpoint: Path, name: str, value: Any) -> None:
    file = checkpoint / "base" / "model.safetensors"
    tensors = dict(load_file(file))
    tensors[name] = value(tensors[name])
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("part", "value", "options", "said"),
    [
        ("qzeros", lambda zeros: np.full_like(zeros, -1), {}, "qzeros: a zero point is 16, above 15"),
        ("scales", lambda scales: scales.astype(np.float32) + np.float32(1e-6), {"activations": Precision.FP16},
         "scales in float32 that float16 does not hold exactly; build with --activations fp32"),
        ("scales", lambda scales: np.where(scales == scales[0, 0], np.float16(np.nan), scales), {},
         "q_proj.scales has a scale of nan; fetch the checkpoint again"),
        ("scales", lambda scales: np.full_like(scales, np.inf), {}, "q_proj.scales has a scale of inf; fetch"),
        ("qweight", lambda numbers: numbers[:-1], {}, r"qweight' is \[15, 128\], expected \[16, 128\]"),
        ("qweight", lambda numbers: numbers.astype(np.int64), {}, "qweight' is int64: quantised weights are"),
    ],
)  # fmt: skip
def test_broken_tensors(tmp_path: Path, part: str, value: Any, options: dict[str, Any], said: str) -> None:
    checkpoint = changed(tmp_path, "gptq")
    edit(checkpoint, f"model.layers.0.self_attn.q_proj.{part}", value)
    with pytest.raises(CheckpointError, match=said):
        build(checkpoint, tmp_path / "package", precision="int4", **options)
    assert not (tmp_path / "package").exists()
