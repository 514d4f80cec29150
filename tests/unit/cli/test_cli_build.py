import json
import re
from pathlib import Path
from typing import Any

import pytest
from support import Cli, make_checkpoint

from trimkv_export.engine.package import Package


def build_arguments(checkpoint: Path, *more: str | Path) -> list[str | Path]:
    return ["build", "--model", checkpoint / "base", "--gates", checkpoint / "gates", "--budget", "8", *more]


def test_json_report(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    done = cli(*build_arguments(checkpoint, "--output", tmp_path / "package", "--json"))
    assert (done.code, done.err) == (0, "")
    report = json.loads(done.out)
    config = Package.open(tmp_path / "package").config
    assert report["package"] == str(tmp_path / "package")
    assert report["weight_bytes"] == config.weight_bytes
    assert report["cache_bytes"] == config.cache.nbytes()
    assert report["full_cache_bytes"] == config.cache.full_cache_nbytes(131072)
    assert report["package_bytes"] == sum(
        file.stat().st_size for file in (tmp_path / "package").iterdir() if file.name != "config.json"
    )
    assert report["eviction"] == {
        "policy": "global", "budget": 8, "evict_every": 32, "min_tokens_per_head": 0, "lookahead_steps": 1
    }  # fmt: skip


def test_every_option_arrives(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "evict-every": 5, "prefill-chunk": 17, "precision": "fp16", "policy": "global", "min-tokens-per-head": 2,
        "lookahead-steps": 3, "weights": "link", "output": tmp_path / "package",
    }  # fmt: skip
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    assert cli(*build_arguments(checkpoint, *flags)).code == 0
    config = Package.open(tmp_path / "package").config
    eviction = config.eviction
    assert (eviction.policy, eviction.budget, eviction.evict_every) == ("global", 8, 5)
    assert (eviction.min_tokens_per_head, eviction.lookahead_steps) == (2, 3)
    assert (config.prefill_chunk, config.precision) == (17, "fp16")


@pytest.mark.parametrize(("weights", "links"), [("link", 2), ("copy", 1)])
def test_linked_weights(cli: Cli, tmp_path: Path, weights: str, links: int) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    output = tmp_path / "package"
    done = cli(*build_arguments(checkpoint, "--precision", "bf16", "--weights", weights, "--output", output))
    assert done.code == 0
    assert (output / "model.safetensors").stat().st_nlink == links


def test_text_report_and_default_name(
    cli: Cli, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli(*build_arguments(checkpoint))
    assert (done.code, done.err) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["base-m8"]
    assert "Built base-m8" in done.out
    assert "trimkv-export run base-m8 --prompt TEXT" in done.out
    assert "qwen3, rg10 gates, fp32" in done.out
    again = cli(*build_arguments(checkpoint))
    assert again.code == 7
    assert "pass --overwrite" in again.err
    assert cli(*build_arguments(checkpoint, "--overwrite")).code == 0


@pytest.mark.parametrize("gate", ["rg", "rg10"])
def test_the_policy_follows_the_gates(cli: Cli, tmp_path: Path, gate: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", gate=gate)
    done = cli(*build_arguments(checkpoint, "--output", tmp_path / "package", "--json"))
    assert json.loads(done.out)["eviction"]["policy"] == {"rg": "per_head", "rg10": "global"}[gate]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--budget", "0"], "budget must be a whole number from 1 to 1048576, got 0"),
        (["--budget", "many"], "'many' is not a valid integer"),
        (["--policy", "threshold"], "policy 'threshold' .* memory has no bound"),
        (["--policy", "best"], "policy must be one of global, per_head, got 'best'"),
        (["--evict-every", "0"], "evict-every must be"),
        (["--prefill-chunk", "0"], "prefill-chunk must be"),
        (["--lookahead-steps", "0"], "lookahead-steps must be"),
        (["--min-tokens-per-head", "9"], "min-tokens-per-head must not exceed the budget"),
        (["--min-tokens-per-head", "2", "--policy", "per_head"], "applies to the global policy only"),
        (["--precision", "int3"], "'int3' is not one of"),
        (["--weights", "move"], "'move' is not one of"),
        (["--revision", "main"], "revision 'main' needs a hub id"),
        (["--no-such-option"], "No such option"),
    ],
)
def test_bad_options(cli: Cli, checkpoint: Path, tmp_path: Path, options: list[str], said: str) -> None:
    done = cli(*build_arguments(checkpoint, "--output", tmp_path / "package", *options))
    assert done.code == 2
    assert done.out == ""
    assert re.search(said, done.err)
    assert not list(tmp_path.iterdir())


def test_minimum_per_head_with_gates_of_the_other_policy(cli: Cli, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", gate="rg")
    done = cli(*build_arguments(checkpoint, "--min-tokens-per-head", "2", "--output", tmp_path / "package"))
    assert done.code == 2
    assert "applies to the global policy only" in done.err
