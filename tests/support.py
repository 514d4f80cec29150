"""What tests of several folders share: small checkpoints, packages, and edits that keep a package's hashes right."""

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from trimkv_export.backends.native import find_library
from trimkv_export.build.builder import BuildReport, build_package
from trimkv_export.checkpoint.aliases import ALIASES
from trimkv_export.checkpoint.config_file import read_config
from trimkv_export.checkpoint.shipped import bundled_gates, shipped_folder
from trimkv_export.config import BuildOptions, Precision, WeightStorage
from trimkv_export.runtime import Engine

ROOT = Path(__file__).parents[1]
GOLDEN = sorted(path for path in (ROOT / "tests" / "golden").iterdir() if path.is_dir())
# Recorded with images; several share a checkpoint.
GOLDEN_VISUAL = sorted(file.parent for file in (ROOT / "tests" / "golden_visual").glob("*/case.json"))
# For tests that run with both kinds of kernels, and what Engine.open calls them.
NATIVE_MODE = {"portable": "off", "native": "require"}
KERNELS = [
    "portable",
    pytest.param("native", marks=pytest.mark.skipif(find_library() is None, reason="not built: make plugins")),
]
# One file of weights, 262 tokens of vocabulary at most, steps of less than a millisecond.
SMALL: dict[str, Any] = {
    "layers": 3, "hidden": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "intermediate": 48, "gate_hidden": 16
}  # fmt: skip
OPTIONS: dict[str, Any] = {"budget": 8, "evict_every": 4, "prefill_chunk": 16}
# Of the small checkpoint of Qwen3-VL, after 256 bytes and three tokens of text.
VISION_START, VISION_END, IMAGE, VIDEO = range(259, 263)
MAX_IMAGE_TOKENS = 40


def load_example(name: str) -> Any:
    """A script of examples/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_checkpoint(out: Path, **changes: Any) -> Path:
    """Write out/base and out/gates: the demo checkpoint in small, with a tokenizer of one token per byte."""
    load_example("demo_checkpoint").make_checkpoint(out, **SMALL | changes)
    return out


def make_visual_checkpoint(out: Path, **changes: Any) -> Path:
    """As `make_checkpoint`, of Qwen3-VL. Its preprocessor leaves small pictures small: a token per 32 x 32 pixels."""
    make_checkpoint(out, family="qwen3_vl", **changes)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        file = out / "base" / name
        config = json.loads(file.read_text())
        config["size"]["shortest_edge"] = 1024
        file.write_text(json.dumps(config))
    return out


def shipped_config(alias: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config.json of an alias's backbone and that of its gates, as they come with the program."""
    found = ALIASES[alias]
    backbone, gates = shipped_folder(found.backbone), bundled_gates(found.gates) or shipped_folder(found.gates)
    if backbone is None or gates is None:
        raise FileNotFoundError(alias)
    return read_config(backbone), read_config(gates)


def build(checkpoint: Path, output: Path, **changes: Any) -> BuildReport:
    """Build the package of checkpoint/base and checkpoint/gates."""
    values: dict[str, Any] = {"model": str(checkpoint / "base"), "gates": str(checkpoint / "gates")} | OPTIONS | changes
    for name, kind in (("precision", Precision), ("weights", WeightStorage)):
        if name in values:
            values[name] = kind(values[name])
    return build_package(BuildOptions(output=output, **values))


def build_case(case: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Build the package that a recorded case is for; returns the arguments it was recorded with."""
    recorded: dict[str, Any] = json.loads((case / "case.json").read_text())
    build(
        case / recorded.get("checkpoint", "."),
        output,
        budget=recorded["budget"],
        evict_every=max(1, recorded["buffer"]),
        prefill_chunk=max(recorded["chunks"]),
        min_tokens_per_head=recorded["min_per_head"],
        lookahead_steps=recorded["lookahead"],
        **changes,
    )
    return recorded


def write_gates(
    folder: Path, kind: str, layers: int, hidden: int, kv_heads: int, inner: int = 16, seed: int = 0
) -> None:
    """Random gates in the official layout: config.json and a torch file, `linear3` once per layer."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    shared = normal(kv_heads, inner)
    state: dict[str, torch.Tensor] = {}
    for layer in range(layers):
        prefix = f"model.layers.{layer}.self_attn.retention_gate."
        state |= {f"{prefix}bias": normal(kv_heads) + 2, f"{prefix}linear1.weight": normal(inner, hidden)}
        state[f"{prefix}linear1.bias"] = normal(inner)
        if kind == "rg":
            state[f"{prefix}linear2.weight"] = normal(kv_heads, inner)
        else:
            state |= {f"{prefix}linear2.weight": normal(inner, inner), f"{prefix}linear2.bias": normal(inner)}
            state[f"{prefix}linear3.weight"] = shared
    folder.mkdir(parents=True)
    torch.save(state, folder / "trimkv_weights.pth")
    config = {"base_model": "../base", "retention_gate": kind, "memory_size": 64}
    (folder / "config.json").write_text(json.dumps(config))


def randomize(model: torch.nn.Module) -> None:
    """Weights that leave activations of ordinary size in any model, and norms and biases that are not trivial."""
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.normal_(std=scale).add_(parameter.ndim == 1)


def initializers(package: Path, graph: str = "decoder.onnx") -> dict[str, NDArray[Any]]:
    """Every weight of one of a package's graphs by name."""
    model = onnx.load(str(package / graph))
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def copy_package(source: Path, target: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(source, target)
    return target


def seal(package: Path, changes: Mapping[str, Any] | None = None) -> None:
    """Make the hashes of a package fit its (changed) files and config, as somebody who knows the format could."""
    file = package / "config.json"
    body = json.loads(file.read_text()) | dict(changes or {})
    for name, entry in body["files"].items():
        data = (package / name).read_bytes()
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    file.write_bytes(sealed(body))


def sealed(body: Mapping[str, Any]) -> bytes:
    """A config.json of this content, with the hash that fits."""
    rest = {name: value for name, value in body.items() if name != "config_sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    rest["config_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps(rest, indent=2, ensure_ascii=False).encode() + b"\n"


def check_batch(engine: Engine, tolerance: float) -> None:
    """A batch of four rows of different lengths gives what each row gives alone."""
    sessions = [engine.session() for _ in range(4)]
    for row, session in enumerate(sessions):
        session.step(list(range(3 + row)))
    together = engine.step_many([(session, [row]) for row, session in enumerate(sessions)])
    for row, session in enumerate(sessions):
        session.reset()
        session.step(list(range(3 + row)))
        assert abs(session.step([row]) - together[row]).max() < tolerance


def random_tokens(count: int, seed: int = 0, vocabulary: int = 256) -> list[int]:
    """Token ids of the small checkpoint; no special ones."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, vocabulary, count)]


@dataclass(frozen=True)
class Result:
    """What one command of the command line did."""

    code: int
    out: str
    err: str


Cli = Callable[..., Result]


def keep_inputs_exact(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have quantised weights take their inputs as they are, not rounded to int8: by ONNX Runtime's own kernels."""
    monkeypatch.setattr("trimkv_export.runtime.engine.serves_quantized", lambda *_: False)
    model = onnx.load(package / "decoder.onnx", load_external_data=False)
    for function in model.functions:
        for node in function.node:
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = 0
    (package / "decoder.onnx").write_bytes(model.SerializeToString())
    seal(package)
