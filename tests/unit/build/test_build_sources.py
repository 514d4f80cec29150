"""What checkpoints hold besides what the model needs, what they lack, and what is wrong with it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import build, initializers, make_checkpoint, make_visual_checkpoint
from visual_models import save_checkpoint, visual_model

from trimkv_export.checkpoint import open_gates
from trimkv_export.errors import CheckpointError
from trimkv_export.runtime import Engine

Tensors = dict[str, np.ndarray]
Q_PROJ = "model.layers.1.self_attn.q_proj"


def change(checkpoint: Path, changed: Callable[[Tensors], Any], **config: Any) -> Path:
    """Edit the weights of checkpoint/base in place, and its config.json."""
    file = checkpoint / "base" / "model.safetensors"
    tensors = {name: value.copy() for name, value in load_file(file).items()}
    tensors = changed(tensors) or tensors
    save_file(tensors, file)
    path = checkpoint / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return checkpoint


def logits(package: Path) -> np.ndarray:
    with Engine.open(package, threads=1) as engine:
        return engine.session().step([1, 2, 3, 4])


def same_logits(tmp_path: Path, changed: Callable[[Tensors], Any], **shape: Any) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **shape)
    build(checkpoint, tmp_path / "before")
    change(checkpoint, changed)
    build(checkpoint, tmp_path / "after")
    np.testing.assert_array_equal(logits(tmp_path / "before"), logits(tmp_path / "after"))


def refused(tmp_path: Path, changed: Callable[[Tensors], Any], said: str, **config: Any) -> None:
    checkpoint = change(make_checkpoint(tmp_path / "checkpoint"), changed, **config)
    with pytest.raises(CheckpointError, match=said):
        build(checkpoint, tmp_path / "package")
    assert not (tmp_path / "package").exists()


class TestNames:
    def test_without_the_first_part(self, tmp_path: Path) -> None:
        same_logits(tmp_path, lambda found: {name.removeprefix("model."): value for name, value in found.items()})

    def test_of_a_vision_model_without_the_first_part(self, tmp_path: Path) -> None:
        checkpoint = make_visual_checkpoint(tmp_path / "checkpoint")
        build(checkpoint, tmp_path / "before")
        change(checkpoint, lambda found: {name.removeprefix("model."): value for name, value in found.items()})
        build(checkpoint, tmp_path / "after")
        np.testing.assert_array_equal(logits(tmp_path / "before"), logits(tmp_path / "after"))

    @pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
    def test_of_the_model_without_its_head(self, tmp_path: Path, family: str) -> None:
        save_checkpoint(tmp_path, visual_model(family), layout="memory")
        build(tmp_path, tmp_path / "before", max_image_tokens=64)
        change(tmp_path, lambda found: {name.removeprefix("model."): value for name, value in found.items()})
        build(tmp_path, tmp_path / "after", max_image_tokens=64)
        np.testing.assert_array_equal(logits(tmp_path / "before"), logits(tmp_path / "after"))

    def test_both_with_and_without(self, tmp_path: Path) -> None:
        def both(found: Tensors) -> None:
            found["embed_tokens.weight"] = found["model.embed_tokens.weight"].copy()

        refused(tmp_path, both, "are the same tensor: fetch the checkpoint again")

    def test_gates_and_backbone_in_one_file(self, tmp_path: Path) -> None:
        checkpoint = make_checkpoint(tmp_path / "checkpoint")
        build(checkpoint, tmp_path / "before")
        gates = {info.name: info.read() for layer in open_gates(checkpoint / "gates").layers for info in layer.values()}
        last = next(name for name in gates if "linear3" in name)
        gates |= {last.replace("layers.2.", f"layers.{layer}."): gates[last].copy() for layer in range(3)}
        gates = {name: value.astype(np.float32) for name, value in gates.items()}
        config = json.loads((checkpoint / "gates" / "config.json").read_text())
        config = {key: config[key] for key in config if "gate" in key or key == "memory_size"}
        change(checkpoint, lambda found: found | gates, **config)
        base = str(checkpoint / "base")
        for name, options in (("both", {"gates": base}), ("alone", {"gates": None}), ("backbone", {})):
            build(checkpoint, tmp_path / name, **options)
            np.testing.assert_array_equal(logits(tmp_path / "before"), logits(tmp_path / name))


class TestHead:
    @pytest.mark.parametrize("name", ["lm_head.weight"])
    def test_a_copy_of_a_tied_embedding(self, tmp_path: Path, name: str) -> None:
        def copied(found: Tensors) -> None:
            found[name] = found["model.embed_tokens.weight"].copy()

        same_logits(tmp_path, copied)

    def test_a_tied_head_that_differs(self, tmp_path: Path) -> None:
        def differs(found: Tensors) -> None:
            found["lm_head.weight"] = found["model.embed_tokens.weight"].copy()
            found["lm_head.weight"][-1, -1] += 1

        refused(tmp_path, differs, "tie_word_embeddings is true, and 'lm_head.weight' differs .* set tie_word_emb")

    def test_of_another_type_or_shape(self, tmp_path: Path) -> None:
        def halves(found: Tensors) -> None:
            found["lm_head.weight"] = found["model.embed_tokens.weight"][:-1].copy()

        refused(tmp_path, halves, "'lm_head.weight' differs")

    def test_none_where_it_is_not_tied(self, tmp_path: Path) -> None:
        said = r"missing 'lm_head.weight': there is no head: .* \(AutoModel, and not AutoModelForCausalLM"
        refused(tmp_path, lambda _: None, said, tie_word_embeddings=False)


class TestBiases:
    def test_of_zeros(self, tmp_path: Path) -> None:
        def zeros(found: Tensors) -> None:
            for name in [name for name in found if name.endswith("_proj.weight")]:
                found[name.replace("weight", "bias")] = np.zeros(len(found[name]), found[name].dtype)

        same_logits(tmp_path, zeros)

    def test_that_say_something(self, tmp_path: Path) -> None:
        def some(found: Tensors) -> None:
            found[f"{Q_PROJ}.bias"] = np.zeros(32, np.float16)
            found[f"{Q_PROJ}.bias"][[3, 5]] = 0.5, np.nan

        refused(tmp_path, some, f"'{Q_PROJ}.bias' holds 2 values that are not 0, and this model has no such bias")


def test_an_adapter_is_not_passed_over(tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        checkpoint = make_checkpoint(tmp_path / name)
        (checkpoint / "base" / name).write_text("{}")
        with pytest.raises(CheckpointError, match=rf"an adapter of peft \({name}\).* merge it with merge_and"):
            build(checkpoint, tmp_path / "package")


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda found: {name.replace(old, new): value for name, value in found.items()}


def added(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda found: found | {name: np.ones(2, np.float32) for name in names}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (renamed("model.", "module.model."), "names begin with 'module.', as programs that wrap"),
        (renamed("model.", "_orig_mod.model."), "names begin with '_orig_mod.'"),
        (added("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"), r"an adapter \(LoRA\): merge it"),
        (added(f"{Q_PROJ}.weight.absmax"), "quantised by bitsandbytes"),
        (added(f"{Q_PROJ}.weight_scale_inv"), "quantised to fp8"),
        (renamed(f"{Q_PROJ}.weight", f"{Q_PROJ}.qweight"), "are quantised, and config.json does not say so"),
        (added("model.layers.0.self_attn.k_scale"), "scales of a KV cache in fp8"),
        (renamed("q_proj", "qkv_proj"), "the projections are fused"),
        (renamed("model.", "language_model.model."), "names begin with 'language_model.'"),
        (added("model.layers.0.mlp.experts.0.up_proj.weight"), "mixtures of experts"),
        (added("score.weight"), "a head for classification or rewards"),
        (added("visual.blocks.0.norm1.weight"), "a model with vision, and config.json describes another"),
        (added("model.layers.3.input_layernorm.weight"), r"fewer layers \(num_hidden_layers\)"),
        (lambda found: found.pop(f"{Q_PROJ}.weight") is None,
         "download is incomplete, or config.json is of a larger"),
        (renamed("q_proj", "query"), "the weights do not match config.json, or the download is incomplete"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(tmp_path: Path, changed: Callable[[Tensors], Any], said: str) -> None:
    refused(tmp_path, changed, said)


class TestNotFinite:
    @pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "int4"])
    @pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
    @pytest.mark.parametrize("name", [f"{Q_PROJ}.weight", "model.norm.weight", "model.embed_tokens.weight"])
    def test_tensor_and_count_are_named(self, tmp_path: Path, name: str, precision: str, dtype: Any) -> None:
        def broken(found: Tensors) -> Tensors:
            found = {each: value.astype(dtype) for each, value in found.items()}
            found[name].flat[[0, 3]] = np.nan
            found[name].flat[-1] = -np.inf
            return found

        checkpoint = change(make_checkpoint(tmp_path / "checkpoint", intermediate=64), broken)
        said = rf"{name} holds 2 values that are no number \(NaN\) and 1 that are infinite, of [\d,]+: "
        with pytest.raises(CheckpointError, match=said):
            build(checkpoint, tmp_path / "package", precision=precision)
        assert not (tmp_path / "package").exists()

    @pytest.mark.parametrize("weights", ["copy", "link"])
    def test_weights_that_stay_as_they_are(self, tmp_path: Path, weights: str) -> None:
        def broken(found: Tensors) -> None:
            found["model.layers.0.mlp.down_proj.weight"][1, 1] = np.nan

        checkpoint = change(make_checkpoint(tmp_path / "checkpoint"), broken)
        dtype = next(iter(load_file(checkpoint / "base" / "model.safetensors").values())).dtype
        precision = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[str(dtype)]
        with pytest.raises(CheckpointError, match=r"layers.0.mlp.down_proj.weight holds 1 values that are no number"):
            build(checkpoint, tmp_path / "package", precision=precision, weights=weights)

    def test_gates(self, tmp_path: Path) -> None:
        checkpoint = make_checkpoint(tmp_path / "checkpoint")
        layers = open_gates(checkpoint / "gates").layers
        gates = {info.name: np.array(info.read(), np.float32) for layer in layers for info in layer.values()}
        last = next(name for name in gates if "linear3" in name)
        gates |= {last.replace("layers.2.", f"layers.{layer}."): gates[last].copy() for layer in range(3)}
        gates["model.layers.1.self_attn.retention_gate.bias"][0] = np.inf
        (checkpoint / "gates" / "trimkv_weights.pth").unlink()
        save_file(gates, checkpoint / "gates" / "trimkv_weights.safetensors")
        with pytest.raises(CheckpointError, match=r"layers.1.self_attn.retention_gate.bias holds 0 .* 1 that are inf"):
            build(checkpoint, tmp_path / "package")

    def test_large_values_are_ordinary(self, tmp_path: Path) -> None:
        def large(found: Tensors) -> Tensors:
            found = {name: value.astype(np.float32) for name, value in found.items()}
            found["model.norm.weight"][0] = np.finfo(np.float32).max
            found["model.norm.weight"][1] = -np.finfo(np.float32).tiny
            return found

        checkpoint = change(make_checkpoint(tmp_path / "checkpoint"), large)
        build(checkpoint, tmp_path / "package")
        assert initializers(tmp_path / "package")["model.norm.weight"][0] == np.finfo(np.float32).max
