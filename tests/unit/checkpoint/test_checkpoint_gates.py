import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from trimkv_export.checkpoint.gates import POLICIES, check_gates_fit, is_gates_folder, open_gates
from trimkv_export.errors import CheckpointError, UnsupportedModelError

LAYERS, HEADS, INNER, HIDDEN = 3, 2, 5, 7


def tensors(kind: str, prefix: str = "model.", dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    shapes = {"bias": (HEADS,), "linear1.weight": (INNER, HIDDEN), "linear1.bias": (INNER,)}
    if kind == "rg":
        shapes["linear2.weight"] = (HEADS, INNER)
    else:
        shapes |= {"linear2.weight": (INNER, INNER), "linear2.bias": (INNER,), "linear3.weight": (HEADS, INNER)}
    generator = torch.Generator().manual_seed(1)
    return {
        key(layer, part, prefix): torch.randn(shape, generator=generator).to(dtype)
        for layer in range(LAYERS)
        for part, shape in shapes.items()
    }


def key(layer: int, part: str, prefix: str = "model.") -> str:
    return f"{prefix}layers.{layer}.self_attn.retention_gate.{part}"


def write(folder: Path, state: dict[str, torch.Tensor], config: Any = None) -> Path:
    torch.save(state, folder / "trimkv_weights.pth")
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", ""])
@pytest.mark.parametrize("named", [True, False])
def test_opens_every_layout(tmp_path: Path, kind: str, prefix: str, named: bool) -> None:
    state = tensors(kind, prefix)
    gates = open_gates(write(tmp_path, state, {"retention_gate": kind} if named else None))
    assert (gates.num_layers, gates.num_kv_heads, gates.intermediate_size, gates.hidden_size) == (3, 2, 5, 7)
    assert (gates.kind, gates.policy) == (kind, {"rg": "per_head", "rg10": "global"}[kind])
    assert (gates.base_model, gates.memory_size) == (None, None)
    assert gates.files == (tmp_path / "trimkv_weights.pth",)
    for layer, parts in enumerate(gates.layers):
        for part, info in parts.items():
            source = LAYERS - 1 if part == "linear3.weight" else layer
            assert info.name == key(source, part, prefix)
            np.testing.assert_array_equal(info.read().astype(np.float32), state[info.name].float().numpy())
        assert len(parts) == len(state) // LAYERS


def test_training_fields(tmp_path: Path) -> None:
    fields = {"base_model": "Qwen/Qwen3-4B", "memory_size": 512.0, "num_hidden_layers": 3}
    gates = open_gates(write(tmp_path, tensors("rg"), fields))
    assert (gates.base_model, gates.memory_size) == ("Qwen/Qwen3-4B", 512)


def test_text_config_of_a_vl_model(tmp_path: Path) -> None:
    inner = {"retention_gate": "rg10", "memory_size": 32.0, "num_hidden_layers": 3}
    config = {"base_model": "Qwen/Qwen3-VL-4B-Instruct", "text_config": inner, "retention_gate": None}
    gates = open_gates(write(tmp_path, tensors("rg10", "model.language_model."), config))
    assert gates.memory_size == 32
    assert gates.base_model == "Qwen/Qwen3-VL-4B-Instruct"


@pytest.mark.parametrize(("name", "value"), [("memory_size", v) for v in (0, -1, 1.5, "512", True, float("inf"))])
def test_bad_training_fields(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=rf"{name} must be a whole number from 1 to 2147483647, got {value!r}"):
        open_gates(write(tmp_path, tensors("rg"), {name: value}))


def test_safetensors_in_place_of_pth(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file(tensors("rg"), tmp_path / "any.safetensors")
    assert open_gates(tmp_path).files == (tmp_path / "any.safetensors",)
    (tmp_path / "trimkv_weights.pth").write_bytes(b"never read")
    save_file(tensors("rg10"), tmp_path / "trimkv_weights.safetensors")
    assert open_gates(tmp_path).kind == "rg10"


def test_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"of kind 'rg7', and this version knows rg, rg10"):
        open_gates(write(tmp_path, tensors("rg"), {"retention_gate": "rg7"}))


@pytest.mark.parametrize(("named", "actual"), [("rg", "rg10"), ("rg10", "rg")])
def test_config_and_weights_of_different_kinds(tmp_path: Path, named: str, actual: str) -> None:
    with pytest.raises(
        CheckpointError, match=f"says retention_gate '{named}', and the weights are those of '{actual}'"
    ):
        open_gates(write(tmp_path, tensors(actual), {"retention_gate": named}))


def test_missing_and_unexpected_keys(tmp_path: Path) -> None:
    state = tensors("rg10")
    del state[key(1, "linear3.weight")]
    state["model.embed_tokens.weight"] = torch.ones(1)
    with pytest.raises(CheckpointError, match=rf"missing '{key(1, 'linear3.weight')}'; unexpected 'model.embed_tok"):
        open_gates(write(tmp_path, state))


def test_layers_against_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing 'model\.layers\.3.*', .* and 3 more"):
        open_gates(write(tmp_path, tensors("rg"), {"num_hidden_layers": 5}))
    with pytest.raises(CheckpointError, match=r"up to layer 2, and config.json says num_hidden_layers 2"):
        open_gates(write(tmp_path, tensors("rg"), {"num_hidden_layers": 2}))
    with pytest.raises(CheckpointError, match=r"num_hidden_layers 1000000000"):
        open_gates(write(tmp_path, tensors("rg"), {"num_hidden_layers": 10**9}))


def test_mixed_prefixes_are_named(tmp_path: Path) -> None:
    state = tensors("rg") | {"model.language_model.layers.0.self_attn.retention_gate.bias": torch.ones(2)}
    with pytest.raises(CheckpointError, match=r"unexpected 'model.language_model"):
        open_gates(write(tmp_path, state))


def test_no_gates_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no retention gate .* found 'a'"):
        open_gates(write(tmp_path, {"a": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r"found nothing"):
        open_gates(write(tmp_path, {}))


@pytest.mark.parametrize(
    ("layer", "part", "shape", "message"),
    [
        (2, "linear1.weight", (INNER, HIDDEN + 1), r"layers\.2.*linear1.weight' is \[5, 8\], expected \[5, 7\]"),
        (1, "linear1.bias", (INNER + 1,), r"layers\.1.*is \[6\], expected \[5\]"),
        (1, "bias", (HEADS + 1,), r"is \[3\], expected \[2\]"),
        (0, "linear2.weight", (INNER, HEADS), r"is \[5, 2\], expected \[2, 5\]"),
        (0, "bias", (HEADS, 1), r"a bias of shape \[2, 1\]"),
        (0, "linear1.weight", (INNER, 0), r"linear1.weight of shape \[5, 0\]"),
    ],
)
def test_shapes(tmp_path: Path, layer: int, part: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_gates(write(tmp_path, tensors("rg") | {key(layer, part): torch.ones(shape)}))


def test_dtype(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"wrong dtype: .* is float64"):
        open_gates(write(tmp_path, tensors("rg", dtype=torch.float64)))


def test_missing_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has no gate weights: expected trimkv_weights.safetensors or"):
        open_gates(tmp_path)
    for name in "xy":
        save_file(tensors("rg"), tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"has 'x.safetensors', 'y.safetensors': expected"):
        open_gates(tmp_path)


def test_is_gates_folder(tmp_path: Path) -> None:
    assert not is_gates_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    assert not is_gates_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"text_config": {"retention_gate": "rg"}}')
    assert is_gates_folder(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "trimkv_weights.pth").touch()
    assert is_gates_folder(tmp_path)


def test_fit(tmp_path: Path) -> None:
    gates = open_gates(write(tmp_path, tensors("rg"), {"base_model": "Qwen/Qwen3-4B"}))
    check_gates_fit(gates, num_layers=3, num_kv_heads=2, hidden_size=7)
    with pytest.raises(
        CheckpointError,
        match=r"layers 3 and 4, KV heads 2 and 8, hidden size 7 and 9: these .* trained for 'Qwen/Qwen3-4B'",
    ):
        check_gates_fit(gates, num_layers=4, num_kv_heads=8, hidden_size=9)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"retention_gate_activation": "relu"}, "retention_gate_activation 'relu' is not known"),
        ({"text_config": {"retention_scale": 2}}, "text_config.retention_scale 2 is not known"),
        ({"score_temperature": 0.5}, "score_temperature 0.5 is not known"),
        ({"retention_gate": "rg10", "tie_retention_gate_layers": False}, "tie_retention_gate_layers False is not supp"),
    ],
)
def test_keys_that_are_not_known(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    folder = write(tmp_path, tensors("rg10"), change)
    with pytest.raises(UnsupportedModelError, match=f"config.json: {said}"):
        open_gates(folder)


def test_keys_that_say_nothing(tmp_path: Path) -> None:
    empty: dict[str, Any] = {"retention_gate_activation": None, "other": {}, "more": [], "notes": "", "scale": 0}
    official = {"attn_impl": "rg_attn_flex", "tie_retention_gate_layers": True, "retention_gate_bias_init": 1.5}
    assert open_gates(write(tmp_path, tensors("rg10"), empty | official)).kind == "rg10"
