"""Write a small random Qwen3 checkpoint with retention gates, in the file layout of the official ones.

    python examples/demo_checkpoint.py OUT [--gate rg10|rg] [--seed 0] …

    OUT/base/    Hugging Face Qwen3: config.json, model.safetensors (bfloat16), generation_config.json, tokenizer.json
                 and tokenizer_config.json (one token per byte, ChatML template)
    OUT/gates/   config.json, with base_model "../base", and trimkv_weights.pth; without torch, which alone writes that
                 format, the same tensors as trimkv_weights.safetensors

It talks nonsense, but every part of the tool chain treats it like a trained one: its heads retain tokens for very
different times, and activations stay near 1.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from trimkv_export.errors import OptionError

__all__ = ["make_checkpoint"]

Tensors = dict[str, npt.NDArray[Any]]  # bfloat16, by Hugging Face name

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # after the 256 bytes
END_OF_TEXT, _, IM_END = range(256, 259)
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
GATE_GAIN = 8.0  # the last projection's: some tokens are kept many times as long as others, as trained gates do

CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def make_checkpoint(
    out: Path,
    *,
    gate: str = "rg10",
    seed: int = 0,
    layers: int = 4,
    hidden: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    intermediate: int = 256,
    gate_hidden: int = 32,
    tie: bool = True,
    max_position: int = 131072,
) -> None:
    """Write `out`/base and `out`/gates; the same arguments give the same tensors. Existing files are replaced.

    gate: rg (TrimKV) or rg10 (DBTrimKV).
    tie: the output layer shares the embedding.
    Raises OptionError when the sizes do not make a model.
    """
    if min(layers, hidden, heads, kv_heads, head_dim, intermediate, gate_hidden, max_position) < 1:
        raise OptionError("every size must be at least 1")
    if heads % kv_heads:
        raise OptionError(f"heads must be a multiple of kv-heads, got {heads} and {kv_heads}")
    if head_dim % 2:
        raise OptionError(f"head-dim must be even, got {head_dim}")
    if gate not in ("rg", "rg10"):
        raise OptionError(f"gate must be rg or rg10, got {gate!r}")
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": IM_END,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "max_position_embeddings": max_position,
        "max_window_layers": layers,
        "model_type": "qwen3",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": tie,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCAB_SIZE,
    }
    gates_config = config | {
        "base_model": "../base",
        "memory_size": 64,
        "retention_gate": gate,
        "retention_gate_intermediate_size": gate_hidden,
        "trainable_params": "retention_gate",
    }
    rng = np.random.default_rng(seed)
    base, gates = out / "base", out / "gates"
    base.mkdir(parents=True, exist_ok=True)
    gates.mkdir(exist_ok=True)
    _write_json(base / "config.json", config)
    _write_json(base / "generation_config.json", {"bos_token_id": END_OF_TEXT, "eos_token_id": [IM_END, END_OF_TEXT]})
    save_file(dict(_backbone(config, rng)), base / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(base, max_position)
    _write_json(gates / "config.json", gates_config)
    _write_gates(gates, dict(_gates(gates_config, rng)))


def _backbone(config: dict[str, Any], rng: np.random.Generator) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """The tensors of Qwen3ForCausalLM."""
    hidden, intermediate, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    yield "model.embed_tokens.weight", _random(rng, VOCAB_SIZE, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", _ones(hidden)
        yield prefix + "self_attn.q_proj.weight", _random(rng, query, hidden)
        yield prefix + "self_attn.k_proj.weight", _random(rng, kv, hidden)
        yield prefix + "self_attn.v_proj.weight", _random(rng, kv, hidden)
        yield prefix + "self_attn.o_proj.weight", _random(rng, hidden, query)
        yield prefix + "self_attn.q_norm.weight", _ones(dim)
        yield prefix + "self_attn.k_norm.weight", _ones(dim)
        yield prefix + "post_attention_layernorm.weight", _ones(hidden)
        yield prefix + "mlp.gate_proj.weight", _random(rng, intermediate, hidden)
        yield prefix + "mlp.up_proj.weight", _random(rng, intermediate, hidden)
        yield prefix + "mlp.down_proj.weight", _random(rng, hidden, intermediate)
    yield "model.norm.weight", _ones(hidden)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", _random(rng, VOCAB_SIZE, hidden)


def _gates(config: dict[str, Any], rng: np.random.Generator) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """The retention gates; with rg10 all layers share `linear3`, which the file holds once per layer."""
    hidden, kv_heads = config["hidden_size"], config["num_key_value_heads"]
    inner = config["retention_gate_intermediate_size"]
    shared = _random(rng, kv_heads, inner, gain=GATE_GAIN)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.self_attn.retention_gate."
        # By the bias alone, beta ** age falls to a half after 2 tokens (bias 1) to 14 tokens (bias 3).
        yield prefix + "bias", rng.uniform(1.0, 3.0, kv_heads).astype(ml_dtypes.bfloat16)
        yield prefix + "linear1.weight", _random(rng, inner, hidden)
        yield prefix + "linear1.bias", _random(rng, inner)
        if config["retention_gate"] == "rg":
            yield prefix + "linear2.weight", _random(rng, kv_heads, inner, gain=GATE_GAIN)
        else:
            yield prefix + "linear2.weight", _random(rng, inner, inner)
            yield prefix + "linear2.bias", _random(rng, inner)
            yield prefix + "linear3.weight", shared


def _random(rng: np.random.Generator, *shape: int, gain: float = 1.0) -> npt.NDArray[Any]:
    """Normal, with standard deviation gain / sqrt(fan in): with gain 1 a product keeps the size of its input."""
    values = rng.standard_normal(shape, np.float32) * np.float32(gain / np.sqrt(shape[-1]))
    rounded: npt.NDArray[Any] = values.astype(ml_dtypes.bfloat16)
    return rounded


def _ones(size: int) -> npt.NDArray[Any]:
    return np.ones(size, ml_dtypes.bfloat16)


def _write_gates(folder: Path, tensors: Tensors) -> None:
    for name in ("trimkv_weights.pth", "trimkv_weights.safetensors"):
        (folder / name).unlink(missing_ok=True)  # what is left of another run
    try:
        import torch
    except ImportError:
        save_file(tensors, folder / "trimkv_weights.safetensors")
        return
    # torch cannot read NumPy's bfloat16, so the bits are passed; as copies, as the layers share one `linear3` array.
    state = {
        name: torch.from_numpy(value.view(np.int16).copy()).view(torch.bfloat16) for name, value in tensors.items()
    }
    torch.save(state, folder / "trimkv_weights.pth")


def _write_tokenizer(folder: Path, max_position: int) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_prefix_space": False,
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": max_position,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the command line and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--gate", choices=("rg10", "rg"), default="rg10", help="kind of retention gate")
    parser.add_argument("--tie", action=argparse.BooleanOptionalAction, default=True, help="tie output and embedding")
    for name, value in {
        "seed": 0,
        "layers": 4,
        "hidden": 128,
        "heads": 4,
        "kv-heads": 2,
        "head-dim": 32,
        "intermediate": 256,
        "gate-hidden": 32,
        "max-position": 131072,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    options = vars(parser.parse_args())
    try:
        make_checkpoint(**options)
    except OptionError as error:
        parser.error(str(error))
    print(f"wrote {options['out']}/base and {options['out']}/gates")


if __name__ == "__main__":
    main()
