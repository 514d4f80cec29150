"""Checkpoints that are quantised already come into a package bit for bit."""

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from quantized_checkpoints import LAYOUTS, quantize_checkpoint
from safetensors.numpy import load_file, save_file
from support import build, keep_inputs_exact, make_checkpoint

from trimkv_export.config import HeadWeights, PlanOptions, Precision
from trimkv_export.errors import CheckpointError, OptionError, UnsupportedModelError
from trimkv_export.package import DECODER, Package, QuantizationMethod
from trimkv_export.plan.planner import plan_model
from trimkv_export.runtime import Engine
from trimkv_export.verify import check_engine
from trimkv_export.verify.stored_weights import StoredWeights

WEIGHTS: dict[str, Any] = LAYOUTS["compressed"]["config_groups"]["group_0"]["weights"]


def group(**changes: Any) -> dict[str, Any]:
    """compressed-tensors' one group of layers, with changes."""
    return {"config_groups": {"group_0": LAYOUTS["compressed"]["config_groups"]["group_0"] | changes}}


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
        ("gptq", {"desc_act": "yes"}, "desc_act 'yes' is not supported; supported: False, True"),
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


def edit_all(checkpoint: Path, end: str, value: Any) -> None:
    """Change all tensors with this end of their names; None removes them."""
    file = checkpoint / "base" / "model.safetensors"
    tensors = {name: value(each) if name.endswith(end) else each for name, each in load_file(file).items()}
    save_file({name: each for name, each in tensors.items() if each is not None}, file)


def edit(checkpoint: Path, name: str, value: Any) -> None:
    file = checkpoint / "base" / "model.safetensors"
    tensors = dict(load_file(file))
    tensors[name] = value(tensors[name])
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("layout", "changes", "said"),
    [
        # Numbers that are turned or added to by what is not in the weights.
        ("gptq", {"rotation": "hadamard"}, "rotation 'hadamard' is not known"),
        ("gptq", {"adapter": {"lora": {"path": "x"}}}, "adapter .* is not known"),
        ("gptq", {"is_marlin_format": True}, "is_marlin_format True is not known"),
        ("gptq", {"act_bits": 8}, "act_bits 8 is not supported; supported: 16, 32"),
        ("gptq", {"data_type": "mx_fp"}, "data_type 'mx_fp' is not supported"),
        ("gptq", {"pack_dtype": "int16"}, "pack_dtype 'int16' is not supported"),
        ("gptq", {"method": "awq"}, "method 'awq' is not supported"),
        ("gptq", {"format": "gptq_v2", "checkpoint_format": "gptq"}, "format 'gptq_v2' is not supported; .* the same"),
        ("gptq", {"format": "bitblas"}, "format 'bitblas' is not supported"),
        ("gptq", {"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic.* 8 is not supported; supported: what all"),
        ("gptq", {"dynamic": {".*down.*": {"group_size": 64}}}, "dynamic.* 64 is not supported"),
        ("gptq", {"extra_config": {"lm_head": {"data_type": "fp"}}}, "extra_config.* 'fp' is not supported"),
        ("awq", {"pack_method": "order"}, "pack_method 'order' is not known"),
        ("awq", {"format": "gemv"}, "format 'gemv' is not supported"),
        ("awq", {"zero_point": False}, "zero_point False is not supported"),
        ("awq", {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert 'lm_head' is not supported"),
        ("compressed", {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config .* is not known"),
        ("compressed", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme .* is not known"),
        ("compressed", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config .* is not supported"),
        ("awq", {"checkpoint_format": "gemv"}, "checkpoint_format 'gemv' is not supported"),
        ("awq", {"pack_dtype": "int16"}, "pack_dtype 'int16' is not supported"),
        ("awq", {"dynamic": {".*down.*": {"bits": 8}}}, r"dynamic\..*down.*bits 8 is not supported"),
        ("compressed", {"quantization_status": "frozen"}, "quantization_status 'frozen' is not supported"),
        ("compressed", group(output_activations={"num_bits": 8}), "group_0.output_activations .* is not supported"),
        ("compressed", group(input_activations={"num_bits": 8}), "group_0.input_activations .* is not supported"),
        ("compressed", group(format="nvfp4-pack-quantized"), "group_0.format 'nvfp4-pack-quantized' is not"),
        ("compressed", group(weights=WEIGHTS | {"actorder": "group"}), "weights.actorder 'group' is not supported"),
        ("compressed", group(weights=WEIGHTS | {"dynamic": True}), "weights.dynamic True is not supported"),
        ("compressed", group(weights=WEIGHTS | {"block_structure": [2, 4]}), "weights.block_structure .* is not known"),
    ],
)
def test_what_changes_the_numbers_is_refused_by_name(
    tmp_path: Path, layout: str, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=f"config.json: quantization_config.*{said}"):
        build(changed(tmp_path, layout, **changes), tmp_path / "package", precision="int4")
    assert not (tmp_path / "package").exists()


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        # As AutoGPTQ, GPTQModel, AutoRound, AutoAWQ, transformers and llm-compressor write them.
        ("gptq", {"damp_percent": 0.1, "static_groups": False, "true_sequential": True, "model_name_or_path": None,
                  "model_file_base_name": "model", "sym": False, "cache_block_outputs": True}),
        ("gptq", {"checkpoint_format": "gptq", "format": "gptq", "method": "gptq", "pack_dtype": "int32", "meta": {
            "quantizer": ["gptqmodel:5.0.0"], "uri": "https://github.com", "damp_percent": 0.05, "mse": 0.0},
            "lm_head": False, "dynamic": {"+:.*down.*": {"bits": 4, "group_size": 32, "desc_act": True}}}),
        ("gptq", {"tokenizer": None, "dataset": "c4", "block_name_to_quantize": "model.layers", "use_exllama": True,
                  "modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.down_proj"]], "exllama_config": {
                      "version": 1}, "max_input_length": None, "use_cuda_fp16": False, "backend": None,
                  "batch_size": 1, "pad_token_id": None, "module_name_preceding_first_block": None}),
        ("gptq", {"autoround_version": "0.5.1", "data_type": "int", "act_bits": 16, "iters": 200, "lr": 0.005,
                  "packing_format": "auto_round:auto_gptq", "low_gpu_mem_usage": True, "nsamples": 128, "seqlen": 2048,
                  "enable_quanted_input": True, "extra_config": {"lm_head": {"bits": 16}}, "train_bs": 8}),
        ("awq", {"backend": "autoawq", "do_fuse": False, "exllama_config": None, "fuse_max_seq_len": None,
                 "modules_to_fuse": None, "modules_to_not_convert": ["lm_head"]}),
        ("awq", {"checkpoint_format": "gemm", "format": "gemm", "method": "awq", "pack_dtype": "int32", "sym": False,
                 "desc_act": False, "lm_head": False, "meta": {"quantizer": ["gptqmodel:5.0.0"]},
                 "dynamic": {"-:.*visual.*": {}}}),
        ("awq", {"provider": "auto-round", "autoround_version": "0.8", "data_type": "int", "packing_format": "auto_awq",
                 "modules_to_not_convert": ["lm_head"], "batch_size": 8}),
        ("gptq", {"gptaq": {"alpha": 0.25, "device": "auto"}, "foem": None, "act_group_aware": True, "rotation": None,
                  "adapter": None, "failsafe": {"strategy": "rtn", "threshold": "0.5%"}, "provider": "auto-round"}),
        ("compressed", {"global_compression_ratio": 1.5, "kv_cache_scheme": None, "quantization_status": "compressed",
                        "sparsity_config": {"format": "dense", "global_sparsity": 0.1, "targets": []}, "version": "0.9",
                        "transform_config": {}}),
    ],
)  # fmt: skip
def test_what_programs_write_is_taken(tmp_path: Path, layout: str, changes: dict[str, Any]) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **SHAPE)
    values = quantize_checkpoint(checkpoint, layout, config=LAYOUTS[layout] | changes)
    build(checkpoint, tmp_path / "package", precision="int4")
    assert_values(tmp_path / "package", values)


def assert_values(path: Path, values: dict[str, Any]) -> Package:
    package = Package.open(path)
    stored = StoredWeights(package.path, DECODER, package.config.quantization)
    for name, value in values.items():
        np.testing.assert_array_equal(stored.read(name), value, name)
    return package


class TestGptq:
    """Versions, zero points and the order of columns."""

    def test_the_second_version_by_its_other_name(self, tmp_path: Path) -> None:
        checkpoint = make_checkpoint(tmp_path / "checkpoint", **SHAPE)
        config = {key: value for key, value in LAYOUTS["gptq_v2"].items() if key != "checkpoint_format"}
        values = quantize_checkpoint(checkpoint, "gptq_v2", config=config | {"format": "gptq_v2"})
        build(checkpoint, tmp_path / "package", precision="int4")
        assert_values(tmp_path / "package", values)

    @pytest.mark.parametrize("layout", ["gptq-sym", "gptq-sym-8"])
    def test_the_second_version_that_calls_itself_the_first(self, tmp_path: Path, layout: str) -> None:
        checkpoint = make_checkpoint(tmp_path / "checkpoint", **SHAPE)
        values = quantize_checkpoint(checkpoint, layout)
        middle = 0x88888888 if layout == "gptq-sym" else 0x80808080
        edit_all(checkpoint, ".qzeros", lambda zeros: np.full_like(zeros.view(np.uint32), middle).view(np.int32))
        build(checkpoint, tmp_path / "package", precision=bits_of(layout))
        assert_values(tmp_path / "package", values)

    def test_symmetric_with_other_zero_points(self, tmp_path: Path) -> None:
        checkpoint = make_checkpoint(tmp_path / "checkpoint", **SHAPE)
        quantize_checkpoint(checkpoint, "gptq-sym")
        edit(checkpoint, "model.layers.0.mlp.up_proj.qzeros", lambda zeros: zeros + (zeros == zeros[0, 0]))
        with pytest.raises(CheckpointError, match=r"qzeros has a zero point of 9, though .* all are 8 \(sym\)"):
            build(checkpoint, tmp_path / "package", precision="int4")

    def test_zero_points_of_zero_borrow_in_the_word(self, tmp_path: Path) -> None:
        checkpoint = make_checkpoint(tmp_path / "checkpoint", **SHAPE)
        values = quantize_checkpoint(checkpoint, "gptq")
        stored = load_file(checkpoint / "base" / "model.safetensors")
        assert any((value.view(np.uint32) & 15 == 15).any() for name, value in stored.items() if "qzeros" in name)
        build(checkpoint, tmp_path / "package", precision="int4")
        assert_values(tmp_path / "package", values)

    def test_columns_in_another_order(self, tmp_path: Path) -> None:
        for count, desc_act in enumerate((True, False)):
            checkpoint = changed(tmp_path / str(count), "gptq", desc_act=desc_act)
            edit(checkpoint, "model.layers.1.self_attn.k_proj.g_idx", lambda groups: groups[::-1].copy())
            said = r"layers.1.self_attn.k_proj.g_idx' puts column 0 into group 3, and not 0: .* \(128 such"
            with pytest.raises(UnsupportedModelError, match=said):
                build(checkpoint, tmp_path / "package", precision="int4")

    def test_in_order_though_it_might_not_be(self, tmp_path: Path) -> None:
        checkpoint = make_checkpoint(tmp_path / "checkpoint", **SHAPE)
        values = quantize_checkpoint(checkpoint, "gptq", config=LAYOUTS["gptq"] | {"desc_act": True})
        build(checkpoint, tmp_path / "package", precision="int4")
        assert_values(tmp_path / "package", values)

    @pytest.mark.parametrize("desc_act", [False, True])
    def test_without_an_order(self, tmp_path: Path, desc_act: bool) -> None:
        checkpoint = changed(tmp_path, "gptq", desc_act=desc_act)
        edit_all(checkpoint, ".g_idx", lambda _: None)
        if desc_act:
            with pytest.raises(CheckpointError, match=r"missing .*g_idx"):
                build(checkpoint, tmp_path / "package", precision="int4")
        else:
            build(checkpoint, tmp_path / "package", precision="int4")

    def test_biases_of_zeros(self, tmp_path: Path) -> None:
        checkpoint = make_checkpoint(tmp_path / "checkpoint", **SHAPE)
        values = quantize_checkpoint(checkpoint, "gptq")
        file = checkpoint / "base" / "model.safetensors"
        biases = {name.replace("weight", "bias"): np.zeros(len(value), np.float16) for name, value in values.items()}
        save_file(load_file(file) | biases, file)
        build(checkpoint, tmp_path / "package", precision="int4")
        assert_values(tmp_path / "package", values)

    @pytest.mark.parametrize(
        ("name", "layout", "content"),
        [
            ("quantize_config.json", "gptq", {"bits": 4, "group_size": 32, "desc_act": False, "sym": False}),
            ("quant_config.json", "awq", {"w_bit": 4, "q_group_size": 32, "version": "GEMM", "zero_point": True}),
        ],
    )
    def test_a_config_of_its_own(self, tmp_path: Path, name: str, layout: str, content: dict[str, Any]) -> None:
        checkpoint = make_checkpoint(tmp_path / "checkpoint", **SHAPE)
        values = quantize_checkpoint(checkpoint, layout)
        file = checkpoint / "base" / "config.json"
        config = json.loads(file.read_text())
        del config["quantization_config"]
        file.write_text(json.dumps(config))
        (checkpoint / "base" / name).write_text(json.dumps(content))
        build(checkpoint, tmp_path / "package", precision="int4")
        assert_values(tmp_path / "package", values)
        (checkpoint / "base" / name).write_text(json.dumps(content | {"rotation": "hadamard"}))
        with pytest.raises(UnsupportedModelError, match=f"{name}: rotation 'hadamard' is not known"):
            build(checkpoint, tmp_path / "other", precision="int4")
        (checkpoint / "base" / name).unlink()
        with pytest.raises(CheckpointError, match=r"are quantised, and config\.json does not say so"):
            build(checkpoint, tmp_path / "other", precision="fp32")


class TestModulesInFloat:
    FLOATS = ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj", "model.layers.2.mlp.down_proj")
    SAID: ClassVar[dict[str, dict[str, Any]]] = {
        "gptq": {"dynamic": {f"-:{name}".replace(".", r"\."): {} for name in FLOATS}},
        "awq": {"modules_to_not_convert": list(FLOATS)},
        "compressed": {"ignore": ["lm_head", *FLOATS]},
    }

    @pytest.mark.parametrize("layout", SAID)
    def test_stay_as_they_are(self, tmp_path: Path, layout: str) -> None:
        checkpoint = make_checkpoint(tmp_path / "checkpoint", **SHAPE)
        plain = load_file(checkpoint / "base" / "model.safetensors")
        values = quantize_checkpoint(
            checkpoint,
            layout,
            only=lambda name: name.endswith("_proj.weight") and not name.startswith(self.FLOATS),
            config=LAYOUTS[layout] | self.SAID[layout],
        )
        values |= {f"{name}.weight": plain[f"{name}.weight"].astype(np.float32) for name in self.FLOATS}
        build(checkpoint, tmp_path / "package", precision="int4")
        package = assert_values(tmp_path / "package", values)
        found = package.config.quantization
        assert found is not None
        assert sorted(found.floats) == sorted(f"{name}.weight" for name in self.FLOATS)
        with Engine.open(package.path) as engine:
            assert check_engine(engine).passed
        options = PlanOptions(
            model=str(checkpoint / "base"), gates=str(checkpoint / "gates"), budget=8, device="l4",
            precision=Precision.INT4, activations=Precision.FP32,
        )  # fmt: skip
        assert plan_model(options).plan.weight_bytes == package.config.weight_bytes

    def test_a_module_that_is_there_in_neither_form(self, tmp_path: Path) -> None:
        checkpoint = make_checkpoint(tmp_path / "checkpoint", **SHAPE)
        quantize_checkpoint(checkpoint, "awq")
        edit_all(checkpoint, "layers.0.mlp.up_proj.qweight", lambda _: None)
        with pytest.raises(CheckpointError, match=r"missing 'model.layers.0.mlp.up_proj.qweight'"):
            build(checkpoint, tmp_path / "package", precision="int4")


@pytest.mark.parametrize("layout", ["gptq", "compressed"])
@pytest.mark.parametrize("head", [None, "int4", "int8"])
def test_a_quantised_head(tmp_path: Path, layout: str, head: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **SHAPE)
    file = checkpoint / "base" / "model.safetensors"
    tensors = dict(load_file(file))
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding[::-1].copy()}, file)
    config = checkpoint / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
    says: dict[str, Any] = {"lm_head": True} if layout == "gptq" else {"ignore": []}
    values = quantize_checkpoint(
        checkpoint,
        layout,
        config=LAYOUTS[layout] | says,
        only=lambda name: name.endswith(("_proj.weight", "head.weight")),
    )
    assert "lm_head.weight" in values
    if head == "int8":
        with pytest.raises(OptionError, match=r"head int8: this checkpoint has a head in int4 \(.*take --head int4"):
            build(checkpoint, tmp_path / "package", precision="int4", head=head)
        return
    build(checkpoint, tmp_path / "package", precision="int4", head=head)
    if head is None:
        values["model.embed_tokens.weight"] = embedding.astype(np.float32)
    package = assert_values(tmp_path / "package", values)
    keep_inputs_exact(package.path, monkeypatch)
    with Engine.open(package.path) as engine:
        assert check_engine(engine).passed


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ({"hidden": 64, "intermediate": 192, "heads": 2}, 64),
        ({"hidden": 96, "intermediate": 160, "heads": 3, "kv_heads": 1}, 32),
        ({"hidden": 48, "intermediate": 80, "heads": 3, "kv_heads": 1, "head_dim": 16}, 16),
        ({"hidden": 40, "intermediate": 72, "heads": 2, "head_dim": 8}, 16),
    ],
)
@pytest.mark.parametrize("layout", ["gptq-row", "compressed-row"])
def test_whole_rows_of_any_number_of_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, shape: dict[str, int], block: int
) -> None:
    monkeypatch.setitem(LAYOUTS, "compressed-row", LAYOUTS["compressed"] | group(
        weights=WEIGHTS | {"strategy": "channel", "group_size": -1, "symmetric": True}
    ))  # fmt: skip
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **SHAPE | shape)
    values = quantize_checkpoint(checkpoint, layout)
    build(checkpoint, tmp_path / "package", precision="int4")
    package = assert_values(tmp_path / "package", values)
    found = package.config.quantization
    assert found is not None
    assert found.block_size == block
    assert set(found.floats) == {name for name, value in values.items() if value.shape[1] % block}
    keep_inputs_exact(package.path, monkeypatch)
    with Engine.open(package.path) as engine:
        assert check_engine(engine).passed


def test_a_last_group_that_is_shorter(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **SHAPE | {"intermediate": 144})
    values = quantize_checkpoint(checkpoint, "gptq")
    build(checkpoint, tmp_path / "package", precision="int4")
    package = assert_values(tmp_path / "package", values)
    assert package.config.quantization is not None
    assert all("down_proj" in name for name in package.config.quantization.floats)
    with Engine.open(package.path) as engine:
        assert check_engine(engine).passed


@pytest.mark.parametrize(
    ("part", "value", "options", "said"),
    [
        ("scales", lambda scales: scales.astype(np.float32) + np.float32(1e-6), {"activations": Precision.FP16},
         "scales in float32 that float16 does not hold exactly; build with --activations fp32"),
        ("scales", lambda scales: np.where(scales == scales[0, 0], np.float16(np.nan), scales), {},
         r"q_proj.scales holds [1-9]\d* values that are no number \(NaN\) and 0 that are infinite, of 512"),
        ("scales", lambda scales: np.full_like(scales, np.inf), {},
         r"q_proj.scales holds 0 values that are no number \(NaN\) and 512 that are infinite, of 512"),
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
