"""Write a random checkpoint with the shapes of a published model, and retention gates for it.

    python benchmarks/random_checkpoint.py OUT --shapes qwen3-4b [--gate rg10|rg] [--seed 0]

    OUT/base/    Hugging Face layout: config.json, bfloat16 safetensors in shards of at most 4 GB, tokenizer, and of
                 Qwen3-VL the preprocessors' configurations
    OUT/gates/   config.json, with base_model "../base", and trimkv_weights.safetensors

For measurements only: sizes, dtypes and files are those of the real model, the text is nonsense. Every tensor differs
from every other, because runtimes were seen to share equal ones. Tensors are streamed: memory stays far below 500 MB.
"""

import argparse
import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from common import ROOT
from numpy.typing import NDArray

from trimkv_export.models import DecoderSpec, decoder_spec, vision_spec

sys.path.append(str(ROOT / "examples"))
from demo_checkpoint import make_checkpoint

__all__ = ["SHAPES", "make_random_checkpoint"]

STD = 0.02  # `initializer_range` of the family; close to 1 / sqrt(fan in), so activations stay in range
SHARD_BYTES = 4 * 10**9
BLOCK_ELEMENTS = 1 << 22  # 8 MB in bfloat16
# The bits of a bfloat16 that may be flipped at random while its size stays: sign and mantissa.
SIGN_AND_MANTISSA = np.uint16(0x807F)


@dataclass(frozen=True)
class VisionShape:
    """What config.json of a published model says of its vision tower."""

    depth: int = 24
    hidden: int = 1024
    intermediate: int = 4096
    heads: int = 16
    patch: int = 16
    temporal_patch: int = 2
    merge: int = 2
    positions: int = 2304
    deepstack: tuple[int, ...] = (5, 11, 17)


@dataclass(frozen=True)
class Shape:
    """What config.json of the published model says."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    vocab: int = 151936
    vision: VisionShape | None = None


SHAPES = {
    "qwen3-4b": Shape(layers=36, hidden=2560, intermediate=9728, heads=32, kv_heads=8),
    "qwen3-0.6b": Shape(layers=28, hidden=1024, intermediate=3072, heads=16, kv_heads=8),
    "qwen3-vl-4b": Shape(layers=36, hidden=2560, intermediate=9728, heads=32, kv_heads=8, vision=VisionShape()),
}

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
Sizes = dict[str, tuple[int, ...]]


class _Values:
    """Normal random bfloat16 values, as fast as a disk writes.

    A piece is a random place of one random block with the signs and mantissas of a random place of another mixed in.
    """

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        normal = self._rng.standard_normal(2 * BLOCK_ELEMENTS, np.float32) * np.float32(STD)
        self._normal: NDArray[np.uint16] = normal.astype(ml_dtypes.bfloat16).view(np.uint16)
        bits = self._rng.integers(0, 1 << 16, 2 * BLOCK_ELEMENTS, np.uint16)
        self._mask: NDArray[np.uint16] = bits & SIGN_AND_MANTISSA

    def write(self, file: BinaryIO, count: int) -> None:
        while count:
            size = min(count, BLOCK_ELEMENTS)
            first, second = self._rng.integers(0, BLOCK_ELEMENTS, 2)
            file.write((self._normal[first : first + size] ^ self._mask[second : second + size]).data)
            count -= size

    def uniform(self, low: float, high: float, count: int) -> bytes:
        values: NDArray[Any] = self._rng.uniform(low, high, count).astype(ml_dtypes.bfloat16)
        return values.tobytes()


def make_random_checkpoint(out: Path, shapes: str, *, gate: str = "rg10", gate_hidden: int = 512, seed: int = 0) -> int:
    """Write `out`/base and `out`/gates and return their bytes; equal arguments give equal files.

    Args:
        out: the folder; files of an earlier run are replaced.
        shapes: a key of `SHAPES`.
        gate: rg or rg10.
        gate_hidden: width of the gates' hidden layers.
        seed: of all values.
    """
    shape = SHAPES[shapes]
    base, gates = out / "base", out / "gates"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    # All that is not a size, the tokenizer included, is that of the demo checkpoint.
    with tempfile.TemporaryDirectory() as folder:
        demo = Path(folder)
        family = "qwen3_vl" if shape.vision else "qwen3"
        tiny: dict[str, Any] = dict.fromkeys(("layers", "heads", "kv_heads"), 1) | dict.fromkeys(
            ("hidden", "head_dim"), 8
        )
        make_checkpoint(demo, family=family, gate=gate, **tiny)
        for target in (base, gates):
            target.mkdir()
            config = _with_sizes(json.loads((demo / target.name / "config.json").read_text()), shape)
            if target is gates:
                text = config["text_config"] if shape.vision else config
                text["retention_gate_intermediate_size"] = gate_hidden
                config["memory_size"] = 512
            (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for name in COMPANIONS:
            if (demo / "base" / name).exists():
                shutil.copyfile(demo / "base" / name, base / name)
    values = _Values(seed)
    config_file = base / "config.json"
    source = json.loads(config_file.read_text())
    spec, tower = decoder_spec(source, config_file), vision_spec(source, config_file)
    _write_backbone(base, {**spec.tensors(), **(tower[0].tensors() if tower else {})}, values)
    _write_file(gates / "trimkv_weights.safetensors", _gates(spec, gate, gate_hidden), values)
    return sum(file.stat().st_size for file in out.rglob("*") if file.is_file())


def _with_sizes(config: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """A config.json of the demo checkpoint with the sizes of `shape`."""
    decoder: dict[str, Any] = {
        "head_dim": shape.head_dim,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": 40960,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
    }
    if shape.vision is None:
        return config | decoder | {"max_window_layers": shape.layers}
    rope = config["text_config"]["rope_scaling"] | {"mrope_section": [24, 20, 20]}
    decoder |= {"max_position_embeddings": 262144, "rope_scaling": rope, "rope_theta": 5000000}
    vision = {
        "deepstack_visual_indexes": shape.vision.deepstack,
        "depth": shape.vision.depth,
        "hidden_size": shape.vision.hidden,
        "intermediate_size": shape.vision.intermediate,
        "num_heads": shape.vision.heads,
        "num_position_embeddings": shape.vision.positions,
        "out_hidden_size": shape.hidden,
        "patch_size": shape.vision.patch,
        "spatial_merge_size": shape.vision.merge,
        "temporal_patch_size": shape.vision.temporal_patch,
    }
    parts = {"text_config": config["text_config"] | decoder, "vision_config": config["vision_config"] | vision}
    return config | parts


def _gates(spec: DecoderSpec, gate: str, inner: int) -> Sizes:
    layer = {"bias": (spec.num_kv_heads,), "linear1.weight": (inner, spec.hidden_size), "linear1.bias": (inner,)}
    last = "linear2.weight"
    if gate == "rg10":
        layer |= {"linear2.weight": (inner, inner), "linear2.bias": (inner,)}
        last = "linear3.weight"
    layer[last] = (spec.num_kv_heads, inner)
    return {
        f"{spec.layer(index)}.self_attn.retention_gate.{part}": size
        for index in range(spec.num_layers)
        for part, size in layer.items()
    }


def _shards(sizes: Sizes) -> Iterator[Sizes]:
    """Tensors in order, as many as fit into a shard."""
    shard: Sizes = {}
    used = 0
    for name, size in sizes.items():
        nbytes = 2 * math.prod(size)
        if shard and used + nbytes > SHARD_BYTES:
            yield shard
            shard, used = {}, 0
        shard[name] = size
        used += nbytes
    yield shard


def _write_backbone(folder: Path, sizes: Sizes, values: _Values) -> None:
    shards = list(_shards(sizes))
    if len(shards) == 1:
        _write_file(folder / "model.safetensors", sizes, values)
        return
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_file(folder / name, shard, values)
        index |= dict.fromkeys(shard, name)
    total = sum(2 * math.prod(size) for size in sizes.values())
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")


def _write_file(path: Path, sizes: Sizes, values: _Values) -> None:
    """A safetensors file: length of the header, header padded to 8 bytes, data."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in sizes.items():
        start, end = end, end + 2 * math.prod(size)
        entries[name] = {"dtype": "BF16", "shape": size, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, size in sizes.items():
            if re.search(r"norm\d?\.weight$", name):
                file.write(values.uniform(0.9, 1.1, size[0]))
            elif name.endswith("retention_gate.bias"):
                # By the bias alone, beta ** age falls to a half after 0.5 tokens (bias -1) to 38 tokens (bias 4).
                file.write(values.uniform(-1, 4, size[0]))
            else:
                values.write(file, math.prod(size))


def main() -> None:
    """Parse the command line and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; what it holds is replaced")
    parser.add_argument("--shapes", choices=sorted(SHAPES), required=True, help="the model whose shapes to take")
    parser.add_argument("--gate", choices=("rg10", "rg"), default="rg10", help="kind of retention gate")
    parser.add_argument("--gate-hidden", type=int, default=512, help="width of the gates' hidden layers; default 512")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")
    options = parser.parse_args()
    arguments = {"gate": options.gate, "gate_hidden": options.gate_hidden, "seed": options.seed}
    nbytes = make_random_checkpoint(options.out, options.shapes, **arguments)
    if options.json:
        print(json.dumps({"out": str(options.out), "shapes": options.shapes, **arguments, "bytes": nbytes}))
    else:
        print(f"wrote {options.out}/base and {options.out}/gates: {nbytes:,} bytes")


if __name__ == "__main__":
    main()
