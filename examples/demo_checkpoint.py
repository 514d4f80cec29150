"""Write a small random checkpoint with retention gates, Qwen3 or Qwen3-VL, in the file layout of the official ones.

    python examples/demo_checkpoint.py OUT [--family qwen3|qwen3_vl] [--gate rg10|rg] [--seed 0] …

    OUT/base/    as on Hugging Face: config.json, model.safetensors (bfloat16), generation_config.json, tokenizer.json
                 and tokenizer_config.json (one token per byte, ChatML template); of Qwen3-VL also
                 preprocessor_config.json and video_preprocessor_config.json
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

FAMILIES = ("qwen3", "qwen3_vl")
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # after the 256 bytes
VISUAL_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")  # of Qwen3-VL, after those
END_OF_TEXT, _, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = range(256, 263)
GATE_GAIN = 8.0  # the last projection's: some tokens are kept many times as long as others, as trained gates do

CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}{{ message.content }}
{%- else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part.type == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- else %}{{ part.text }}{% endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def make_checkpoint(
    out: Path,
    *,
    family: str = "qwen3",
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

    family: qwen3, or qwen3_vl, whose vision tower has half the decoder's width.
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
    if family not in FAMILIES:
        raise OptionError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    if gate not in ("rg", "rg10"):
        raise OptionError(f"gate must be rg or rg10, got {gate!r}")
    decoder: dict[str, Any] = {
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
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "use_cache": True,
        "vocab_size": 256 + len(SPECIAL_TOKENS) + (len(VISUAL_TOKENS) if family == "qwen3_vl" else 0),
    }
    gate_fields = {"retention_gate": gate, "retention_gate_intermediate_size": gate_hidden}
    top = {"tie_word_embeddings": tie, "torch_dtype": "bfloat16"}
    gates_top = {"base_model": "../base", "memory_size": 64, "trainable_params": "retention_gate"}
    if family == "qwen3_vl":
        config = _visual_config(decoder) | top
        gates_config = config | gates_top | {"text_config": config["text_config"] | gate_fields}
        prefix = "model.language_model."
    else:
        window = {"max_window_layers": layers, "sliding_window": None, "use_sliding_window": False}
        config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"} | decoder | window | top
        gates_config = config | gates_top | gate_fields
        prefix = "model."
    rng = np.random.default_rng(seed)
    base, gates = out / "base", out / "gates"
    base.mkdir(parents=True, exist_ok=True)
    gates.mkdir(exist_ok=True)
    _write_json(base / "config.json", config)
    _write_json(base / "generation_config.json", {"bos_token_id": END_OF_TEXT, "eos_token_id": [IM_END, END_OF_TEXT]})
    tensors = dict(_backbone(decoder | top, prefix, rng))
    if family == "qwen3_vl":
        tensors |= _vision_tower(config["vision_config"], rng)
        _write_json(base / "preprocessor_config.json", _processor_config(65_536, 16_777_216))
        _write_json(base / "video_preprocessor_config.json", _processor_config(4_096, 25_165_824))
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(base, max_position, SPECIAL_TOKENS + (VISUAL_TOKENS if family == "qwen3_vl" else ()))
    _write_json(gates / "config.json", gates_config)
    _write_gates(gates, dict(_gates(decoder | gate_fields, prefix, rng)))


def _visual_config(decoder: dict[str, Any]) -> dict[str, Any]:
    """config.json of a Qwen3-VL with this decoder."""
    half = decoder["head_dim"] // 2
    rope = {
        "mrope_interleaved": True,
        "mrope_section": [half - 2 * (half // 3), half // 3, half // 3],
        "rope_type": "default",
    }
    vision = {
        "deepstack_visual_indexes": list(range(min(3, decoder["num_hidden_layers"]))),
        "depth": 4,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": max(16, decoder["hidden_size"] // 2),
        "in_channels": 3,
        "intermediate_size": decoder["hidden_size"],
        "model_type": "qwen3_vl",
        "num_heads": 2,
        "num_position_embeddings": 256,
        "out_hidden_size": decoder["hidden_size"],
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": IMAGE_PAD,
        "model_type": "qwen3_vl",
        "text_config": decoder | {"model_type": "qwen3_vl_text", "rope_scaling": rope},
        "video_token_id": VIDEO_PAD,
        "vision_config": vision,
        "vision_end_token_id": VISION_END,
        "vision_start_token_id": VISION_START,
    }


def _processor_config(least: int, most: int) -> dict[str, Any]:
    """The preprocessor's settings of Qwen3-VL, with its limits on pixels."""
    return {
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "merge_size": 2,
        "patch_size": 16,
        "size": {"longest_edge": most, "shortest_edge": least},
        "temporal_patch_size": 2,
    }


def _backbone(config: dict[str, Any], prefix: str, rng: np.random.Generator) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """The tensors of the decoder."""
    hidden, intermediate, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    yield f"{prefix}embed_tokens.weight", _random(rng, config["vocab_size"], hidden)
    for index in range(config["num_hidden_layers"]):
        layer = f"{prefix}layers.{index}."
        yield layer + "input_layernorm.weight", _ones(hidden)
        yield layer + "self_attn.q_proj.weight", _random(rng, query, hidden)
        yield layer + "self_attn.k_proj.weight", _random(rng, kv, hidden)
        yield layer + "self_attn.v_proj.weight", _random(rng, kv, hidden)
        yield layer + "self_attn.o_proj.weight", _random(rng, hidden, query)
        yield layer + "self_attn.q_norm.weight", _ones(dim)
        yield layer + "self_attn.k_norm.weight", _ones(dim)
        yield layer + "post_attention_layernorm.weight", _ones(hidden)
        yield layer + "mlp.gate_proj.weight", _random(rng, intermediate, hidden)
        yield layer + "mlp.up_proj.weight", _random(rng, intermediate, hidden)
        yield layer + "mlp.down_proj.weight", _random(rng, hidden, intermediate)
    yield f"{prefix}norm.weight", _ones(hidden)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", _random(rng, config["vocab_size"], hidden)


def _vision_tower(config: dict[str, Any], rng: np.random.Generator) -> Tensors:
    """The tensors of the vision tower, its mergers included."""
    hidden, inner, merged = config["hidden_size"], config["intermediate_size"], 4 * config["hidden_size"]
    patch = (config["in_channels"], config["temporal_patch_size"], config["patch_size"], config["patch_size"])
    out: Tensors = {}

    def linear(name: str, rows: int, columns: int) -> None:
        out[f"model.visual.{name}.weight"] = _random(rng, rows, columns)
        out[f"model.visual.{name}.bias"] = _random(rng, rows)

    def norm(name: str, size: int) -> None:
        out[f"model.visual.{name}.weight"] = _ones(size)
        out[f"model.visual.{name}.bias"] = np.zeros(size, ml_dtypes.bfloat16)

    linear("patch_embed.proj", hidden, int(np.prod(patch)))
    weight = out["model.visual.patch_embed.proj.weight"]
    out["model.visual.patch_embed.proj.weight"] = weight.reshape(hidden, *patch)
    out["model.visual.pos_embed.weight"] = _random(rng, config["num_position_embeddings"], hidden)
    for index in range(config["depth"]):
        block = f"blocks.{index}"
        norm(f"{block}.norm1", hidden)
        norm(f"{block}.norm2", hidden)
        linear(f"{block}.attn.qkv", 3 * hidden, hidden)
        linear(f"{block}.attn.proj", hidden, hidden)
        linear(f"{block}.mlp.linear_fc1", inner, hidden)
        linear(f"{block}.mlp.linear_fc2", hidden, inner)
    mergers = {"merger": hidden}  # the main one norms each patch, the others the merged ones
    mergers |= {f"deepstack_merger_list.{i}": merged for i in range(len(config["deepstack_visual_indexes"]))}
    for name, normed in mergers.items():
        norm(f"{name}.norm", normed)
        linear(f"{name}.linear_fc1", merged, merged)
        linear(f"{name}.linear_fc2", config["out_hidden_size"], merged)
    return out


def _gates(config: dict[str, Any], prefix: str, rng: np.random.Generator) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """The retention gates; with rg10 all layers share `linear3`, which the file holds once per layer."""
    hidden, kv_heads = config["hidden_size"], config["num_key_value_heads"]
    inner = config["retention_gate_intermediate_size"]
    shared = _random(rng, kv_heads, inner, gain=GATE_GAIN)
    for index in range(config["num_hidden_layers"]):
        gate = f"{prefix}layers.{index}.self_attn.retention_gate."
        # By the bias alone, beta ** age falls to a half after 2 tokens (bias 1) to 14 tokens (bias 3).
        yield gate + "bias", rng.uniform(1.0, 3.0, kv_heads).astype(ml_dtypes.bfloat16)
        yield gate + "linear1.weight", _random(rng, inner, hidden)
        yield gate + "linear1.bias", _random(rng, inner)
        if config["retention_gate"] == "rg":
            yield gate + "linear2.weight", _random(rng, kv_heads, inner, gain=GATE_GAIN)
        else:
            yield gate + "linear2.weight", _random(rng, inner, inner)
            yield gate + "linear2.bias", _random(rng, inner)
            yield gate + "linear3.weight", shared


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


def _write_tokenizer(folder: Path, max_position: int, special_tokens: tuple[str, ...]) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special_tokens))
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
    parser.add_argument("--family", choices=FAMILIES, default="qwen3", help="model family")
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
