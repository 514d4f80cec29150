"""Commands of docs/tensorrt.md: their flags are known to the tools. Our own are in test_docs.py."""

import argparse
import re
import shlex

import pytest
from support import ROOT

LINES = [line.strip() for line in (ROOT / "docs" / "tensorrt.md").read_text().splitlines() if line.startswith("    ")]
# In samples/common/sampleOptions.cpp of TensorRT 10.3 and 10.13.
TRTEXEC = {
    "--dumpLayerInfo", "--dumpProfile", "--dynamicPlugins", "--loadEngine", "--maxShapes", "--minShapes", "--noTF32",
    "--onnx", "--optShapes", "--profilingVerbosity", "--saveEngine", "--separateProfileRun", "--shapes",
    "--skipInference", "--stronglyTyped", "--useCudaGraph",
}  # fmt: skip


def commands(tool: str) -> list[list[str]]:
    found = [shlex.split(line) for line in LINES if line.startswith(f"{tool} ")]
    assert found
    return found


def test_trtexec() -> None:
    for words in commands("trtexec"):
        assert {word.split("=")[0] for word in words[1:]} <= TRTEXEC


@pytest.mark.filterwarnings("ignore:SelectableGroups:DeprecationWarning")  # of Polygraphy, when it looks for add-ons
def test_polygraphy() -> None:
    registry = pytest.importorskip("polygraphy.tools.registry", reason="not installed: pip install polygraphy")
    parser = argparse.ArgumentParser()
    tools = parser.add_subparsers(dest="tool")
    for tool in registry.TOOL_REGISTRY:
        tool.setup_parser(tools)
    for words in commands("polygraphy"):
        assert parser.parse_args(words[1:]).tool == words[1]


def test_recipes_and_files_are_there() -> None:
    text = " ".join(LINES)
    for name in re.findall(r"engines/[\w.-]+\.yaml", text):
        assert (ROOT / name).is_file()
    for name in re.findall(r"N/(lib[\w.]+)", text):
        assert name.removeprefix("lib").removesuffix(".so") in (ROOT / "plugins/tensorrt/CMakeLists.txt").read_text()
