"""Every name of TensorRT and CUDA that we touch is in the real Python bindings, with the same parameters.

What we touch is what the stand-ins of tests/fake_tensorrt.py have: all else fails in the other tests. The bindings of
TensorRT are those that `tests/bindings/fetch_bindings.sh build/tensorrt-bindings` puts there, imported over stubs of
TensorRT's libraries.
"""

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import fake_tensorrt
import pytest
from support import ROOT

BINDINGS = sorted((ROOT / "build" / "tensorrt-bindings").glob("*==*"))
TENSORRT = [path for path in BINDINGS if path.name.startswith("tensorrt")]
CUDA = [path for path in BINDINGS if path.name.startswith("cuda")]
NOT_FETCHED = "not fetched: tests/bindings/fetch_bindings.sh build/tensorrt-bindings"
# Made by us through their constructors; the others come from methods.
CONSTRUCTED = ("Builder", "OnnxParser", "Runtime", "Refitter", "OnnxParserRefitter")
# Of TensorRT alone.
PLUGINS = {"load_library", "get_creator"}

# Prints, of each class of a module, what it has and the documentation of it: where pybind11 puts the signatures.
DESCRIBE = """
import importlib, json, sys
module = importlib.import_module(sys.argv[1])
found = {name: value for name, value in vars(module).items() if not name.startswith("_")}
def members(value):
    names = getattr(value, "__members__", None) or dir(value)
    return {name: getattr(value, name).__doc__ or "" for name in names}
classes = {name: members(value) for name, value in found.items() if isinstance(value, type)}
print(json.dumps(classes | {"": {name: value.__doc__ or "" for name, value in found.items()}}))
"""


def describe(module: str, folder: Path | None) -> dict[str, dict[str, str]]:
    paths = {} if folder is None else {"PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(folder)}
    run = subprocess.run(
        [sys.executable, "-c", DESCRIBE, module], env=os.environ | paths, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    described: dict[str, dict[str, str]] = json.loads(run.stdout)
    return described


def parameters(documentation: str, name: str) -> list[list[str]]:
    """Names of the parameters in each overload that a docstring tells of."""
    calls = re.findall(rf"^(?:\d+\. )?{name}\((.*?)\)(?: ->.*)?$", documentation, re.MULTILINE)
    plain = [re.sub(r"\[[^\]]*\]", "", call) for call in calls]
    return [[re.split(r"[:=]", part)[0].split()[-1] for part in call.split(",") if part.strip()] for call in plain]


def ours(kind: type) -> dict[str, Any]:
    """What a stand-in says that the real class has."""
    found = {name: value for name, value in vars(kind).items() if not name.startswith("_")}
    found |= dict.fromkeys(fake_tensorrt.ATTRIBUTES.get(kind.__name__, ()))
    if kind.__name__ in CONSTRUCTED:
        found["__init__"] = vars(kind)["__init__"]
    return found


def check(real: Mapping[str, Mapping[str, str]], *, without: frozenset[str] | set[str] = frozenset()) -> int:
    """Compare the stand-in for TensorRT; returns how many names were compared."""
    kinds = [k for k in vars(fake_tensorrt).values() if isinstance(k, type) and k.__module__ == fake_tensorrt.__name__]
    compared = 0
    for kind in kinds:
        if kind.__name__ in fake_tensorrt.NOT_TENSORRT:
            continue
        there = real[kind.__name__]
        if issubclass(kind, Enum):
            assert set(kind.__members__) <= set(there), (kind, set(kind.__members__) - set(there))
            compared += len(kind.__members__)
            continue
        for name, value in ours(kind).items():
            if name in without:
                continue
            assert name in there, f"{kind.__name__}.{name}"
            compared += 1
            if inspect.isfunction(value):
                expected = list(inspect.signature(value).parameters)
                overloads = parameters(there[name], name)
                assert any(given[: len(expected)] == expected for given in overloads), (kind, name, overloads)
    return compared


@pytest.mark.skipif(not TENSORRT, reason=NOT_FETCHED)
@pytest.mark.parametrize("folder", TENSORRT, ids=lambda folder: folder.name)
def test_tensorrt(folder: Path) -> None:
    real = describe("tensorrt_bindings.tensorrt", folder)
    assert check(real) > 60
    for kind, name, documentation in (
        ("IExecutionContext", "execute_async_v3", None),
        ("OnnxParser", "parse_from_file", "parse_from_file(self: OnnxParser, path: str) -> bool"),
        ("BuilderFlag", "STRIP_PLAN", None),
    ):
        changed = {name: documentation} if documentation else {}
        other = {key: text for key, text in real[kind].items() if key != name} | changed
        with pytest.raises(AssertionError, match=name):
            check(real | {kind: other})


def test_tensorrt_rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="not installed: pip install tensorrt-rtx-cu13")
    real = describe("tensorrt_rtx", None)
    assert check(real, without=PLUGINS) > 60
    assert {"num_compute_capabilities", "set_compute_capability"} <= set(real["IBuilderConfig"])
    assert "SM89" in real["ComputeCapability"]


@pytest.mark.skipif(not CUDA, reason=NOT_FETCHED)
@pytest.mark.parametrize("folder", CUDA, ids=lambda folder: folder.name)
def test_cuda(folder: Path) -> None:
    real = describe("cuda.bindings.runtime", folder)
    for name, value in vars(fake_tensorrt.CudaRuntime).items():
        if inspect.isfunction(value) and name.startswith("cuda"):
            expected = list(inspect.signature(value).parameters)[1:]
            assert parameters(real[""][name], name)[0] == expected, name
    for name, members in fake_tensorrt.CUDA_ENUMS.items():
        assert set(members) <= set(real[name])
    assert {"cudaStreamNonBlocking", "cudaHostAllocDefault"} <= set(real[""])
