import hashlib
from math import prod
from typing import Any

import pytest
from support import shipped_config

from trimkv_export.checkpoint.aliases import ALIASES
from trimkv_export.checkpoint.config_file import read_config
from trimkv_export.checkpoint.gates import POLICIES, open_gates, read_gate_config
from trimkv_export.checkpoint.shipped import bundled_gates, shipped_folder, shipped_repositories
from trimkv_export.errors import CheckpointError, UnsupportedModelError
from trimkv_export.models import decoder_spec, vision_spec

# Of the hub's own files, as several public repositories record them.
SHA256 = {
    "Qwen/Qwen3-0.6B": "660db3b73d788119c04535e48cf9be5f55bc3100841a718637ae695b442f27dd",
    "Qwen/Qwen3-1.7B": "1ddb5b89ebc90dcb417a45c213d818577e65976454d29385c8f6140771d95197",
    "Qwen/Qwen3-4B": "8ba006f74fecfaaeb392872a60f4a480e7ec9860153d2e1b769ec81f9a147f8a",
    "Qwen/Qwen3-8B": "f7c4eadfbbf522470667b797a3c89be2524832d2d599797248dc304fff447c30",
    "Qwen/Qwen3-14B": "e73c3664ca09b10a673fef0c22e8a6b456201d49bd4713c9691f775720e8857a",
    "Qwen/Qwen3-4B-Instruct-2507": "5beea1a4a34c62782bfb2f911c606741a3bab8f92d80a118fa053c28af12e8ba",
    "Qwen/Qwen3-VL-2B-Instruct": "bec4b3d446efa05807365c9e1cec03ac590836879d02f3a6da879971154bdd3b",
    "Qwen/Qwen3-VL-4B-Instruct": "edac7703329133edfc53e46ac0081835144c99d7eebf28b71c732694d435224d",
    "Qwen/Qwen3-VL-8B-Instruct": "5cd452860dc1e9c29dd71cc3cef7f39b338b7a40793f7a260655c2d3568f3661",
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": "54acfad3cffe057640904ca8a1e83525e6551c70c7a04c641f5a9eda0bbf64bd",
}
# Distinct parameters: a tied head counts once.
PARAMETERS = {
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-4B-Instruct-2507": 4_022_468_096,
    "Qwen/Qwen3-VL-2B-Instruct": 2_127_532_032,
    "Qwen/Qwen3-VL-4B-Instruct": 4_437_815_808,
    "Qwen/Qwen3-VL-8B-Instruct": 8_767_123_696,
    "Qwen/Qwen3-VL-8B-Thinking": 8_767_123_696,
    "microsoft/Phi-3-mini-128k-instruct": 3_821_079_552,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": 8_030_261_248,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
}


def _config(repo_id: str) -> dict[str, Any]:
    folder = shipped_folder(repo_id)
    assert folder is not None
    return read_config(folder)


@pytest.mark.parametrize("repo_id", SHA256)
def test_a_backbone_config_is_the_hubs_file(repo_id: str) -> None:
    folder = shipped_folder(repo_id)
    assert folder is not None
    assert hashlib.sha256((folder / "config.json").read_bytes()).hexdigest() == SHA256[repo_id]


@pytest.mark.parametrize("repo_id", PARAMETERS)
def test_parameters_equal_the_published_count(repo_id: str) -> None:
    config, folder = _config(repo_id), shipped_folder(repo_id)
    assert folder is not None
    vision = vision_spec(config, folder)
    shapes = decoder_spec(config, folder).tensors() | (vision[0].tensors() if vision else {})
    assert sum(map(prod, shapes.values())) == PARAMETERS[repo_id]


def test_nothing_is_shipped_without_a_check() -> None:
    gates = {alias.gates for alias in ALIASES.values() if bundled_gates(alias.gates) is None}
    assert {alias.backbone for alias in ALIASES.values()} | gates <= set(shipped_repositories())
    assert set(shipped_repositories()) - gates == set(PARAMETERS)


@pytest.mark.parametrize("name", ALIASES)
def test_every_alias_has_both_configs(name: str) -> None:
    backbone, gates = shipped_config(name)
    alias = ALIASES[name]
    assert backbone == _config(alias.backbone)
    assert gates["base_model"] == alias.backbone
    if (bundled := bundled_gates(alias.gates)) is not None:
        found = open_gates(bundled)
        assert (found.kind, found.num_layers, found.num_kv_heads) == ("rg10", 30, 3)
        assert sum(file.stat().st_size for file in bundled.iterdir()) <= 8_000_000
        return
    folder = shipped_folder(alias.gates)
    assert folder is not None
    gate = read_gate_config(folder, gates, 512)
    assert gate.kind == ("rg10" if "/DBTrimKV-" in alias.gates else "rg")
    assert gate.policy == POLICIES[gate.kind]
    assert gate.intermediate_size == (1024 if backbone["model_type"] == "phi3" else 512)
    assert gate.memory_size is not None


@pytest.mark.parametrize(
    ("alias", "file_bytes"), [("qwen3-4b-instruct-2507-trimkv", 94_725_981), ("qwen3-4b", 113_600_000)]
)
def test_gates_fill_the_official_file(alias: str, file_bytes: int) -> None:
    backbone, config = shipped_config(alias)
    folder = shipped_folder(ALIASES[alias].gates)
    assert folder is not None
    gate = read_gate_config(folder, config, 512)
    sizes = {
        "num_layers": backbone["num_hidden_layers"],
        "num_kv_heads": backbone["num_key_value_heads"],
        "hidden_size": backbone["hidden_size"],
    }
    stored = gate.parameters(**sizes)
    if gate.kind == "rg10":  # the file has linear3 once per layer
        stored += (sizes["num_layers"] - 1) * sizes["num_kv_heads"] * gate.intermediate_size
    assert 2 * stored == pytest.approx(file_bytes, rel=1e-3)  # bfloat16


def test_unknown_names() -> None:
    assert shipped_folder("qwen/qwen3-4b") == shipped_folder("Qwen/Qwen3-4B")
    for name in ("../checkpoint", "Qwen", "", "Qwen/Qwen3-32B"):
        assert shipped_folder(name) is None


def test_gates_that_say_too_little() -> None:
    folder = shipped_folder("ngocbh/TrimKV-Qwen3-4B-Math")
    assert folder is not None
    with pytest.raises(CheckpointError, match="names no retention_gate"):
        read_gate_config(folder, {"hidden_size": 64}, 512)
    with pytest.raises(UnsupportedModelError, match="'rg7'"):
        read_gate_config(folder, {"retention_gate": "rg7"}, 512)
    with pytest.raises(CheckpointError, match="intermediate_size must be a whole number from 1 to 2147483647, got 0"):
        read_gate_config(folder, {"retention_gate": "rg", "retention_gate_intermediate_size": 0}, 512)
    assert read_gate_config(folder, {"retention_gate": "rg"}, 48).intermediate_size == 48
