import json
from pathlib import Path
from typing import Any

import click
import pytest
from quiet import QUIET
from support import Cli, build, make_checkpoint

from trimkv_export.cli.console import PORTABLE
from trimkv_export.runtime import Engine, Session
from trimkv_export.text.chat import render_chat

PROMPT = "What does the cache keep of a long text? " * 3
LENGTH = ["--max-new-tokens", "12"]


def report(cli: Cli, *arguments: str | Path, stdin: bytes = b"") -> dict[str, Any]:
    done = cli("run", *arguments, *LENGTH, "--json", stdin=stdin)
    assert (done.code, done.err) == (0, QUIET)
    found: dict[str, Any] = json.loads(done.out)
    return found


def test_text_is_what_the_engine_generates(cli: Cli, package: Path, engine: Engine) -> None:
    tokens = engine.tokenizer.encode(PROMPT)
    session = engine.session()
    expected = list(session.generate(tokens, 12))
    found = report(cli, package, "--prompt", PROMPT)
    assert found["text"] == engine.tokenizer.decode(expected)
    assert (found["prompt_tokens"], found["new_tokens"]) == (len(tokens), len(expected))
    assert (found["tokens_seen"], found["evictions"]) == (session.tokens_seen, session.evictions)
    assert found["cache_bytes"] < engine.cache_bytes
    assert found["prefill_seconds"] > 0
    done = cli("run", package, "--prompt", PROMPT, *LENGTH)
    assert (done.code, done.out, done.err) == (0, found["text"] + "\n", QUIET)


def test_where_a_prompt_comes_from(cli: Cli, package: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT)
    texts = {
        report(cli, package, "--prompt", PROMPT)["text"],
        report(cli, package, "--prompt-file", tmp_path / "prompt.txt")["text"],
        report(cli, package, "--prompt-file", "-", stdin=PROMPT.encode())["text"],
        report(cli, package, stdin=PROMPT.encode())["text"],
    }
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        ([], b"caf\xe9", "stdin: is not UTF-8 text: byte 0xe9 at 3"),
        ([], b"", "stdin: the prompt is empty"),
        (["--prompt-file", "-"], b"\xff", "stdin: is not UTF-8 text: byte 0xff at 0"),
        (["--prompt", "caf\udce9"], b"", "--prompt: is not UTF-8 text, at character 3"),  # as Python has such bytes
        (["--prompt", ""], b"x", "--prompt: the prompt is empty"),
        (["--prompt-file", "/dev/null"], b"x", "--prompt-file /dev/null: the prompt is empty"),
        (["--prompt", "a", "--prompt-file", "b"], b"", "not both"),
        (["--prompt-file", "/no/such/file"], b"", "--prompt-file /no/such/file: cannot be read: No such file"),
        (["--prompt-file", "/"], b"", "Is a directory"),
        (["--max-new-tokens", "0"], b"x", "max_new_tokens must be"),
        (["--budget", "9"], b"x", "budget must be a whole number from 1 to 8"),
        (["--budget", "4", "--session", "x"], b"x", "--budget is part of a saved session"),
        (["--threads", "0"], b"x", "threads must be"),
        (["--temperature", "-1"], b"x", "temperature must be"),
        (["--temperature", "nan"], b"x", "temperature must be"),
        (["--top-p", "2"], b"x", "top_p must be"),
        (["--top-k", "-1"], b"x", "top_k must be"),
        (["--seed", "-1"], b"x", "seed must be"),
    ],
)
def test_bad_options(cli: Cli, package: Path, arguments: list[str], stdin: bytes, said: str) -> None:
    done = cli("run", package, *arguments, stdin=stdin)
    assert (done.code, done.out) == (2, "")
    assert said in done.err


def test_characters_of_several_bytes_arrive_whole(
    cli: Cli, package: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "né, 漢字 and 😀!"
    tokens = engine.tokenizer.encode(text)
    assert len(tokens) == len(text.encode())
    monkeypatch.setattr(Session, "generate", lambda *_, **__: iter(tokens))
    pieces, echo = [], click.echo

    def record(piece: str = "", **more: Any) -> None:
        pieces.append(piece)
        echo(piece, **more)

    monkeypatch.setattr(click, "echo", record)
    done = cli("run", package, "--prompt", "x")
    assert (done.code, done.out) == (0, text + "\n")
    assert {"é", "漢", "字", "😀"} <= set(pieces)  # each as soon as its last byte is there


def test_a_text_that_ends_inside_a_character(cli: Cli, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine.open(package) as engine:
        tokens = engine.tokenizer.encode("a😀")[:-1]
    monkeypatch.setattr(Session, "generate", lambda *_, **__: iter(tokens))
    assert cli("run", package, "--prompt", "x").out == "a\ufffd\n"


def test_chat(cli: Cli, package: Path, engine: Engine) -> None:
    template = engine.tokenizer.chat_template
    assert template is not None
    text = render_chat(template, [{"role": "user", "content": "Hello"}], eos_token=engine.tokenizer.eos_token)
    tokens = engine.tokenizer.encode(text, add_special_tokens=False)
    found = report(cli, package, "--prompt", "Hello", "--chat")
    assert found["prompt_tokens"] == len(tokens) > len("Hello")
    assert found["text"] == engine.tokenizer.decode(list(engine.session().generate(tokens, 12)))


def test_chat_without_a_template(cli: Cli, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "checkpoint")
    file = source / "base" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["chat_template"]
    file.write_text(json.dumps(config))
    path = build(source, tmp_path / "package").path
    done = cli("run", path, "--chat", "--prompt", "Hello")
    assert done.code == 2
    assert "has no chat template; leave chat out" in done.err


def test_a_seed_repeats_the_draws(cli: Cli, package: Path) -> None:
    def draw(seed: int) -> str:
        options = ["--temperature", "1.5", "--top-p", "0.99", "--seed", str(seed)]
        return str(report(cli, package, "--prompt", PROMPT, *options)["text"])

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) == 4


def test_a_saved_session_goes_on(cli: Cli, package: Path, engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "session"
    turns = ["First of all, ", "and then? ", "In the end"]
    texts: list[str] = []
    for turn in turns:
        resume: list[str | Path] = ["--session", file] if texts else []
        found = report(cli, package, "--prompt", turn, *resume, "--save-session", file)
        texts.append(found["text"])
    session, expected = engine.session(), []
    for turn in turns:
        new = list(session.generate(engine.tokenizer.encode(turn, add_special_tokens=False), 12))
        expected.append(engine.tokenizer.decode(new))
        if len(new) == 12:
            session.step(new[-1:])
    assert texts == expected
    assert found["tokens_seen"] == session.tokens_seen == engine.restore(file).tokens_seen


def test_a_smaller_budget_is_saved_with_the_session(cli: Cli, package: Path, engine: Engine, tmp_path: Path) -> None:
    report(cli, package, "--prompt", PROMPT, "--budget", "3", "--save-session", tmp_path / "session")
    assert engine.restore(tmp_path / "session").budget == 3


def test_session_files_that_cannot_be_used(cli: Cli, package: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"nonsense")
    done = cli("run", package, "--prompt", "x", "--session", tmp_path / "bad")
    assert (done.code, done.out) == (6, "")
    assert "not a session file" in done.err


def test_a_session_that_cannot_be_saved_is_refused_before_the_work(
    cli: Cli, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("it was opened")

    monkeypatch.setattr(Engine, "open", work)
    for file in (tmp_path / "no" / "folder", tmp_path):
        done = cli("run", package, "--prompt", "x", *LENGTH, "--save-session", file)
        assert (done.code, done.out) == (7, "")
        assert str(file) in done.err


def test_portable_bodies_are_told_once(cli: Cli, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimkv_export.runtime.engine.find_library", lambda: None)
    short = {"run": ["--prompt", "x", "--max-new-tokens", 1], "bench": ["--prompt-tokens", 1, "--new-tokens", 1]}
    for command, arguments in short.items():
        done = cli(command, package, *arguments, "--json")
        assert (done.code, done.err) == (0, f"{PORTABLE}\n")
        assert json.loads(done.out)["native"] is False
    assert "make plugins" in PORTABLE


def test_stats_go_to_stderr(cli: Cli, package: Path) -> None:
    plain = cli("run", package, "--prompt", PROMPT, *LENGTH)
    done = cli("run", package, "--prompt", PROMPT, *LENGTH, "--stats", "--threads", "1")
    assert (done.code, done.out) == (0, plain.out)
    assert "prompt tokens in" in done.err
    assert "evictions, cache" in done.err


def test_a_note_beyond_the_trained_length(cli: Cli, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "checkpoint", max_position=50)
    path = build(source, tmp_path / "package").path
    assert cli("run", path, "--prompt", "x" * 30, "--max-new-tokens", "20").err == QUIET
    done = cli("run", path, "--prompt", "x" * 31, "--max-new-tokens", "20")
    assert done.code == 0
    assert "up to 51 positions, but the backbone was made for 50" in done.err
