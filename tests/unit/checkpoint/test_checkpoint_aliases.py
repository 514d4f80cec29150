import pytest

from trimkv_export.checkpoint.aliases import ALIASES, find_alias
from trimkv_export.checkpoint.shipped import bundled_gates

OFFICIAL_GATES = {
    "TrimKV-Qwen3-1.7B-Math": "Qwen/Qwen3-1.7B",
    "TrimKV-Qwen3-4B-Math": "Qwen/Qwen3-4B",
    "TrimKV-Qwen3-8B-Math": "Qwen/Qwen3-8B",
    "TrimKV-Qwen3-14B-Math": "Qwen/Qwen3-14B",
    "TrimKV-Qwen3-4B-Instruct-2507": "Qwen/Qwen3-4B-Instruct-2507",
    "TrimKV-Phi-3-mini-128k-instruct": "microsoft/Phi-3-mini-128k-instruct",
    "TrimKV-DeepSeek-R1-Distill-Llama-8B": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    "DBTrimKV-Qwen3-4B-Math": "Qwen/Qwen3-4B",
    "DBTrimKV-Qwen3-4B-Instruct-2507": "Qwen/Qwen3-4B-Instruct-2507",
    "DBTrimKV-Qwen3-VL-8B-Thinking": "Qwen/Qwen3-VL-8B-Thinking",
    "DBTrimKV-Qwen3-VL-4B-Instruct": "Qwen/Qwen3-VL-4B-Instruct",
}


def test_every_official_checkpoint_has_one_alias() -> None:
    official = [alias for alias in ALIASES.values() if bundled_gates(alias.gates) is None]
    assert {alias.gates.removeprefix("ngocbh/"): alias.backbone for alias in official} == OFFICIAL_GATES
    assert len(official) == len(OFFICIAL_GATES)
    assert all(name == alias.name == name.lower() for name, alias in ALIASES.items())


@pytest.mark.parametrize("name", ["qwen3-4b", "qwen3-4b-instruct-2507", "qwen3-vl-4b", "qwen3-vl-8b", "Qwen3-VL-4B"])
def test_plain_names_prefer_the_global_budget(name: str) -> None:
    alias = find_alias(name)
    assert alias is not None
    assert alias.gates.startswith("ngocbh/DBTrimKV-")


def test_unknown_names() -> None:
    assert find_alias("gpt") is None
