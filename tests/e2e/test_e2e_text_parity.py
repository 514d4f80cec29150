"""With a budget above the context nothing is evicted, and a package is an ordinary Qwen3: transformers is the judge."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import build, random_tokens, randomize, write_gates
from transformers import Qwen3Config, Qwen3ForCausalLM

from trimkv_export.build.builder import build_package
from trimkv_export.config import BuildOptions
from trimkv_export.runtime import Engine

CONFIG: dict[str, Any] = {
    "num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "vocab_size": 101, "max_position_embeddings": 512,
    "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}  # fmt: skip
CHUNKS = [1, 32, 1, 1, 7, 32, 2, 31, 1, 1, 1, 30, 3, 32, 25]
VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "attention_bias": {"attention_bias": True},
    "one_kv_head": {"num_key_value_heads": 1},
    "no_gqa": {"num_key_value_heads": 4},
    "wide_heads": {"head_dim": 32, "num_attention_heads": 6},
    "gelu": {"hidden_act": "gelu"},
    "gelu_tanh_large_eps": {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-3},
    "one_layer": {"num_hidden_layers": 1},
}


def save_model(folder: Path, changes: dict[str, Any], *, version: int) -> Qwen3ForCausalLM:
    """A random Qwen3 as transformers saves it; with version 4, its config.json as that version wrote it."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**CONFIG | changes)).eval()
    randomize(model)
    model.save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    assert "rope_parameters" in config
    assert "rope_theta" not in config
    if version == 4:
        config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
        file.write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant: str, version: int, tmp_path: Path) -> None:
    config = CONFIG | VARIANTS[variant]
    model = save_model(tmp_path / "base", VARIANTS[variant], version=version)
    sizes = config["num_hidden_layers"], config["hidden_size"], config["num_key_value_heads"]
    write_gates(tmp_path / "gates", "rg10" if version == 4 else "rg", *sizes)
    build(tmp_path, tmp_path / "package", budget=224, prefill_chunk=32)
    tokens = random_tokens(sum(CHUNKS), vocabulary=101)
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    with Engine.open(tmp_path / "package", threads=1) as engine:
        session = engine.session()
        for length in CHUNKS:
            seen = session.tokens_seen
            logits = session.step(tokens[seen : seen + length])
            np.testing.assert_allclose(logits, expected[seen + length - 1], atol=1e-4)
        assert session.tokens_seen == len(tokens) == 200
        assert session.evictions == 0
        assert len(session.kept()) == 200 * engine.config.cache.num_streams


def test_gates_name_their_backbone(tmp_path: Path) -> None:
    model = save_model(tmp_path / "base", {}, version=5)
    write_gates(tmp_path / "gates", "rg", 3, 48, 2)
    options = BuildOptions(model=str(tmp_path / "gates"), output=tmp_path / "package", budget=64)
    build_package(options)
    with torch.no_grad():
        expected = model(torch.tensor([[1, 2, 3]])).logits[0, -1].numpy()
    with Engine.open(tmp_path / "package") as engine:
        np.testing.assert_allclose(engine.session().step([1, 2, 3]), expected, atol=1e-4)
