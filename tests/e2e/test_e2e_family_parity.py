"""Random small models of every text family against transformers, with a budget that nothing is evicted from."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import build, random_tokens, randomize, write_gates
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, Qwen2Config

from trimkv_export.runtime import Engine

SIZES: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CASES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama_biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "llama_odd_head": (LlamaConfig, {"head_dim": 10, "tie_word_embeddings": True}),
    "llama3": (LlamaConfig, {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}}),
    "llama_linear": (LlamaConfig, {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "llama_yarn": (LlamaConfig, {"rope_scaling": YARN}),
    "qwen2": (Qwen2Config, {}),
    "qwen2_tied": (Qwen2Config, {"tie_word_embeddings": True, "num_key_value_heads": 6}),
    "qwen2_odd_head": (Qwen2Config, {"head_dim": 10, "num_key_value_heads": 1}),
    "phi3": (Phi3Config, {"sliding_window": 256}),
    "phi3_partial": (Phi3Config, {"partial_rotary_factor": 0.5, "num_key_value_heads": 6}),
    "phi3_odd_head": (Phi3Config, {"head_dim": 10, "num_key_value_heads": 1, "tie_word_embeddings": True}),
}


def save_model(folder: Path, kind: type, changes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**SIZES | changes)).eval()
    randomize(model)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    kind, changes = CASES[case]
    model = save_model(tmp_path / "base", kind, changes)
    write_gates(tmp_path / "gates", "rg", 3, 48, (SIZES | changes)["num_key_value_heads"])
    build(tmp_path, tmp_path / "package", budget=224, prefill_chunk=64)
    tokens = random_tokens(150, vocabulary=101)
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    with Engine.open(tmp_path / "package", threads=1) as engine:
        session = engine.session()
        for start, end in ((0, 64), (64, 100), (100, 101), (101, 150)):
            np.testing.assert_allclose(session.step(tokens[start:end]), expected[end - 1], atol=1e-4)


@pytest.mark.parametrize("length", [63, 64, 65, 120])
def test_longrope_around_the_switch(length: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    factors = {name: rng.uniform(1, 4, 4).tolist() for name in ("short_factor", "long_factor")}
    rope = {"rope_type": "longrope", **factors}
    changes = {"rope_scaling": rope, "original_max_position_embeddings": 64, "sliding_window": 256}
    model = save_model(tmp_path / "base", Phi3Config, changes)
    write_gates(tmp_path / "gates", "rg", 3, 48, 2)
    build(tmp_path, tmp_path / "package", budget=224, prefill_chunk=32, context=length)
    tokens = random_tokens(length, vocabulary=101)
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0, -1].numpy()
    with Engine.open(tmp_path / "package", threads=1) as engine:
        np.testing.assert_allclose(engine.session().prefill(tokens), expected, atol=1e-4)
