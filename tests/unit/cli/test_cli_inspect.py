import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import Cli, build, copy_package, seal

from trimkv_export.package import Package
from trimkv_export.policy import plan_slab
from trimkv_export.runtime import Engine

TEXT = "Which head remembers which part of this text? " * 4


def test_json_is_the_config(cli: Cli, package: Path) -> None:
    done = cli("inspect", package, "--json")
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out) == json.loads((package / "config.json").read_text())


def test_text(cli: Cli, package: Path) -> None:
    done = cli("inspect", package)
    assert (done.code, done.err) == (0, "")
    for part in ("3 layers, 4 heads, 2 KV heads of 8", "budget 8, evict every 4", "prefill chunk", "decoder.onnx.data"):
        assert part in done.out
    assert set(Package.open(package).config.files) <= set(done.out.split())


@pytest.mark.parametrize("budget", [None, 3])
def test_kept_writes_a_picture(cli: Cli, package: Path, engine: Engine, tmp_path: Path, budget: int | None) -> None:
    picture = tmp_path / "kept.png"
    more = [] if budget is None else ["--budget", budget]
    done = cli("inspect", package, "--kept", picture, *more, "--json", stdin=TEXT.encode())
    assert (done.code, done.err) == (0, "")
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    report = json.loads(done.out)
    session = engine.session(budget)
    session.prefill(engine.tokenizer.encode(TEXT))
    kept = session.kept()
    assert report["tokens"] == len(TEXT)
    assert report["entries_kept"] == len(kept) == np.sum(report["kept_per_head"])
    assert report["evictions"] == session.evictions > 0
    assert report["share_kept"] == pytest.approx(len(kept) / (len(TEXT) * 6))
    assert np.shape(report["kept_per_head"]) == (3, 2)
    assert report["picture"] == str(picture)
    text = cli("inspect", package, "--kept", picture, "--prompt", TEXT)
    assert (text.code, text.err) == (0, "")
    assert "entries kept" in text.out


def test_kept_in_a_chat(cli: Cli, package: Path, tmp_path: Path) -> None:
    picture = tmp_path / "kept.svg"
    done = cli("inspect", package, "--kept", picture, "--chat", "--prompt", "Hello", "--json")
    assert json.loads(done.out)["tokens"] > len("Hello")
    assert b"<svg" in picture.read_bytes()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing/kept.png", "there is no folder"),
        (".", "is a folder"),
        ("kept.unknown", "the picture cannot be written: .unknown is no kind"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_the_work(
    cli: Cli, package: Path, tmp_path: Path, name: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("it was opened")

    monkeypatch.setattr(Engine, "open", work)
    done = cli("inspect", package, "--kept", tmp_path / name, "--prompt", "x")
    assert (done.code, done.out) == (7, "")
    assert said in done.err


def test_marks_are_the_tokens_of_a_text(cli: Cli, package: Path, tmp_path: Path) -> None:
    """A token is a byte: é has two, of which the last stands for it."""
    kept = ("inspect", package, "--kept", tmp_path / "kept.png", "--prompt", "é 12, 345 and 6")
    found = json.loads(cli(*kept, "--mark", "[0-9]{2,}", "--json").out)
    assert found["marked"] == [[3, 5], [7, 10]]
    assert 0 < found["marked_share_kept"] <= 1
    assert json.loads(cli(*kept, "--mark", "é", "--json").out)["marked"] == [[1, 2]]
    assert "marked text   2 places of 5 tokens" in cli(*kept, "--mark", "[0-9]{2,}").out
    for pattern, said in (
        ("[", "--mark '[' is not a regular expression"),
        ("a{99999999999}", "--mark 'a{99999999999}' is not a regular expression"),
        ("nosuch", "matches nothing"),
    ):
        done = cli(*kept, "--mark", pattern)
        assert (done.code, done.out) == (2, "")
        assert said in done.err


@pytest.mark.parametrize(
    "more", [["--mark", "x"], ["--chat"], ["--image", "x"], ["--budget", 0], ["--prompt-file", "x"]]
)
def test_what_goes_with_kept_alone(cli: Cli, package: Path, more: list[Any]) -> None:
    done = cli("inspect", package, *more)
    assert (done.code, done.err) == (2, f"error: {more[0]} goes with --kept FILE.png\n")


def test_bad_options(cli: Cli, package: Path, checkpoint: Path, tmp_path: Path) -> None:
    assert cli("inspect", package, "--prompt", "x").code == 2
    assert cli("inspect", package, "--kept", tmp_path / "kept.png", "--budget", 99, "--prompt", "x").code == 2
    assert cli("inspect", checkpoint / "base").code == 6
    bf16 = build(checkpoint, tmp_path / "bf16", precision="bf16").path
    assert cli("inspect", bf16).code == 0
    assert cli("inspect", bf16, "--kept", tmp_path / "kept.png", "--prompt", "x").code == 8


def test_cache_bytes_are_what_every_command_allocates(cli: Cli, package: Path, engine: Engine, tmp_path: Path) -> None:
    """One name, one meaning: the slab of one sequence, aligned."""
    run = cli("run", package, "--prompt", "x", "--max-new-tokens", 1, "--json")
    bench = cli("bench", package, "--prompt-tokens", 1, "--new-tokens", 1, "--json")
    kept = cli("inspect", package, "--kept", tmp_path / "kept.png", "--prompt", "x", "--json")
    shown = cli("inspect", package, "--json")
    sizes = {json.loads(done.out)["cache_bytes"] for done in (run, bench, kept, shown)}
    slab = plan_slab(engine.config.cache)
    assert sizes == {slab.nbytes}
    assert slab.nbytes > engine.config.cache.nbytes()


def test_a_package_by_a_stranger(cli: Cli, package: Path, tmp_path: Path) -> None:
    """What it says of itself may lack anything, or be commands for a terminal."""
    changed = copy_package(package, tmp_path / "package")
    seal(changed, {"source": {"model": "\x1b[2J\x1b]0;owned\x07\u202egnp.exe"}, "producer": {"\x9b31m": "1"}})
    done = cli("inspect", changed)
    assert done.code == 0
    assert "\\x1b[2J\\x1b]0;owned\\x07\\u202egnp.exe with gates ?" in done.out
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(done.out)
