import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from quiet import QUIET
from support import Cli

from trimkv_export.backends.native import find_library
from trimkv_export.runtime import Engine, Session

SHORT = ["--prompt-tokens", "70", "--new-tokens", "5", "--repeat", "2", "--warmup", "1"]


def report(cli: Cli, *arguments: str | Path) -> dict[str, Any]:
    done = cli("bench", *arguments, "--json")
    assert (done.code, done.err) == (0, QUIET)
    found: dict[str, Any] = json.loads(done.out)
    return found


@pytest.mark.parametrize("batch", [1, 3])
def test_a_report(cli: Cli, package: Path, batch: int) -> None:
    found = report(cli, package, *SHORT, "--batch", str(batch))
    asked = {"prompt_tokens": 70, "new_tokens": 5, "batch": batch, "budget": 8, "provider": "cpu"}
    assert {name: found[name] for name in asked} == asked
    assert found["cache_bytes"] > 0
    assert found["peak_resident_bytes"] > found["cache_bytes"]
    assert found["native"] == (find_library() is not None)
    assert found["evictions"] > 0
    for name, rate in (("time_to_first_token_seconds", "prefill"), ("inter_token_seconds", "decode")):
        assert 0 < found[name]["p50"] <= found[name]["p99"]
        assert found[f"{rate}_tokens_per_second"] > 0


def test_steps_are_as_many_as_asked_for(cli: Cli, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    step_many = Engine.step_many

    def counted(self: Engine, work: Sequence[tuple[Session, Sequence[int]]]) -> Any:
        taken.append(len(work))
        return step_many(self, work)

    monkeypatch.setattr(Engine, "step_many", counted)
    report(cli, package, *SHORT, "--batch", "2")
    assert taken == [2] * 4 * 3  # five new tokens, of which a prompt gives one; three runs


def test_one_new_token_is_the_prompts_own(cli: Cli, package: Path) -> None:
    found = report(cli, package, "--prompt-tokens", "3", "--new-tokens", "1", "--repeat", "1", "--warmup", "0")
    assert found["decode_tokens_per_second"] is None
    assert found["inter_token_seconds"] is None


def test_a_table_for_a_person(cli: Cli, package: Path) -> None:
    done = cli("bench", package, *SHORT)
    assert done.code == 0
    assert "1 x 70 + 5 tokens, budget 8" in done.out
    assert "between tokens" in done.out


def test_tokens_that_stand_for_pictures_are_left_out(cli: Cli, visual_package: Path) -> None:
    assert report(cli, visual_package, "--prompt-tokens", "400", "--new-tokens", "2")["evictions"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch", "0"], "0 is not in the range x>=1"),
        (["--prompt-tokens", "-1"], "-1 is not in the range"),
        (["--budget", "9"], "budget must be a whole number from 1 to 8"),
        (["--provider", "tpu"], "'tpu' is not one of 'cpu', 'cuda'"),
        (["--batch", "2", "--check-plan"], "is for a batch of 1, this run's is 2"),
    ],
)
def test_bad_options(cli: Cli, package: Path, arguments: list[str], said: str) -> None:
    done = cli("bench", package, *arguments)
    assert done.code == 2
    assert said in done.err
