"""A real model, SmolLM2-135M-Instruct, through build, run, verify and eval; `make test-real` fetches it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, Cli, write_gates

from trimkv_export.package import Package

BASE = ROOT / "examples/smollm2/HuggingFaceTB/SmolLM2-135M-Instruct"
pytestmark = [
    pytest.mark.fetched,
    pytest.mark.skipif(not BASE.is_dir(), reason="the model was not fetched: make test-real"),
]
# Tokens of the longest text here are fewer, so that nothing leaves: the gates are random.
BUDGET = 512
# Perplexity on CONTRIBUTING.md of the package in float32 is within these of that of others, as factors.
PRECISIONS = {"fp32": 1.0, "int8": 1.05, "int4": 2.0}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    (folder / "base").symlink_to(BASE)
    write_gates(folder / "gates", "rg10", 30, 576, 3)
    return folder


@pytest.fixture(scope="module")
def perplexities() -> dict[str, float]:
    """By precision, of the tests so far."""
    return {}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_real_model(cli: Cli, source: Path, tmp_path: Path, perplexities: dict[str, float], precision: str) -> None:
    package = tmp_path / precision
    base, gates = source / "base", source / "gates"
    weights = ["--weights", "link"] if precision == "fp32" else []
    built = cli(
        "build", "--model", base, "--gates", gates, "--budget", BUDGET, "--precision", precision, *weights,
        "--context", 2048, "--output", package, "--json",
    )  # fmt: skip
    assert built.code == 0, built.err
    assert json.loads(built.out)["notes"] == []
    text = Package.open(package).config.companions
    assert text is not None
    assert text.text is not None
    assert text.text.eos_token_ids == [2]  # <|im_end|>
    told = report(cli, "run", package, "--chat", "--prompt", "What is the capital of France?", "--max-new-tokens", 24)
    assert "Paris" in told["text"]
    assert told["finish_reason"] == "stop"
    checked = report(cli, "verify", package)
    assert checked["passed"]
    assert checked["companions"] == "tokenizer, chat template"
    article = tmp_path / "article.txt"
    article.write_text((ROOT / "CONTRIBUTING.md").read_text()[:2000])
    found = report(cli, "eval", package, "--text", article, "--context", 256, "--policy", "full")
    perplexities[precision] = found["results"][0]["perplexity"]
    assert perplexities[precision] < perplexities["fp32"] * PRECISIONS[precision] + 0.01
    shutil.rmtree(package)


def report(cli: Cli, *arguments: object) -> dict[str, Any]:
    """What a command says in JSON."""
    done = cli(*arguments, "--json")
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found
