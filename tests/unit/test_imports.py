"""The rooms of the package, in order: each imports those above it, never up and never in a circle."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT

SOURCE = ROOT / "trimkv_export"
# From the lowest. A room may import every room of an earlier line, and of its own line those to its left.
ORDER = (
    ("compat", "errors", "dtypes", "words", "checks", "files"),
    ("config",),
    ("checkpoint", "models", "text"),
    ("policy", "backends"),
    ("package", "graph"),
    ("vision", "quantization"),
    ("plan",),
    ("build", "runtime"),
    ("serving", "verify", "evaluation", "training"),
    ("cli",),
)
RANK = {room: rank for rank, room in enumerate(room for line in ORDER for room in line)}
MAY_IMPORT_ONNX = {"build", "plan", "quantization", "graph"}
SCRIPT = """
import sys
import trimkv_export.checkpoint
banned = {"torch", "onnx", "transformers", "safetensors", "ml_dtypes", "huggingface_hub", "pickle"}
print(sorted(banned & set(sys.modules)))
ours = {name for name in sys.modules if name.startswith("trimkv_export.")}
print(sorted(name for name in ours if not name.startswith("trimkv_export.checkpoint")))
"""


def _module(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {_module(file): file for file in sorted(SOURCE.rglob("*.py"))}


def _imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, wherever it does, also for types alone."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in FILES else node.module


IMPORTS = {module: sorted(set(_imports(file))) for module, file in FILES.items()}


def _room(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "trimkv_export" and len(parts) > 1 else None


def test_every_room_has_its_place() -> None:
    rooms = {_room(module) for module in FILES} - {None, "__main__"}
    assert rooms == set(RANK)


def test_imports_run_downwards() -> None:
    upwards = [
        f"{module} imports {imported}"
        for module, found in IMPORTS.items()
        for imported in found
        if (here := _room(module)) in RANK and (there := _room(imported)) in RANK and RANK[there] > RANK[here]
    ]
    assert upwards == []


def test_no_circle() -> None:
    graph = {module: {name for name in found if name in FILES and name != module} for module, found in IMPORTS.items()}
    # An __init__ imports what is in its folder, which is no circle unless that imports the folder's name.
    left = dict(graph)
    while ready := [module for module, needs in left.items() if not needs & left.keys()]:
        for module in ready:
            del left[module]
    assert sorted(left) == []


@pytest.mark.parametrize("module", [module for module in FILES if _room(module) not in MAY_IMPORT_ONNX])
def test_only_builders_import_onnx(module: str) -> None:
    assert [name for name in IMPORTS[module] if name.split(".")[0] == "onnx"] == []


@pytest.mark.parametrize("module", [module for module in FILES if _room(module) != "training"])
def test_only_training_imports_torch(module: str) -> None:
    assert [name for name in IMPORTS[module] if name.split(".")[0] in ("torch", "transformers")] == []


def test_the_policy_and_the_package_import_no_framework() -> None:
    frameworks = {"onnx", "onnxruntime", "torch", "transformers", "tensorrt", "tokenizers"}
    for module, found in IMPORTS.items():
        if _room(module) in ("policy", "package"):
            assert {name.split(".")[0] for name in found} & frameworks == set()


def test_the_checkpoint_layer_is_light() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    loaded, ours = done.stdout.splitlines()
    assert set(loaded.strip("[]").replace("'", "").split(", ")) <= {"", "pickle"}  # NumPy itself imports pickle
    below = {f"trimkv_export.{name}" for name in ORDER[0]}
    assert set(ours.strip("[]").replace("'", "").split(", ")) <= below
