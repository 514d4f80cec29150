"""Sessions on disk: they go on exactly where they were, and nothing damaged is read."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import build, random_tokens

from trimkv_export.errors import EngineError, OutputError, PackageError
from trimkv_export.runtime import Engine, Session

STEPS = [random_tokens(length, seed=length) for length in (16, 3, 1, 16, 1, 1, 1, 7)]


@pytest.fixture
def saved(session: Session, tmp_path: Path) -> Path:
    """A session file after three evictions."""
    for tokens in STEPS[:5]:
        session.step(tokens)
    assert session.evictions == 3
    session.save(tmp_path / "session")
    session.close()
    return tmp_path / "session"


@pytest.mark.parametrize("after", range(len(STEPS)))
@pytest.mark.parametrize("budget", [8, 3])
def test_goes_on_with_the_same_bits(package: Path, tmp_path: Path, after: int, budget: int) -> None:
    with Engine.open(package, threads=1) as engine, engine.session(budget) as session:
        for tokens in STEPS[:after]:
            session.step(tokens)
        session.save(tmp_path / "session")
        expected = [session.step(tokens) for tokens in STEPS[after:]]
        kept, state = session.kept(), {name: array.copy() for name, array in session.state.items()}
    with Engine.open(package, threads=1, max_sessions=3) as other:
        other.session().step([1])  # so that the row is another one
        session = other.restore(str(tmp_path / "session"))
        assert session.budget == budget
        assert session.tokens_seen == sum(map(len, STEPS[:after]))
        for tokens, logits in zip(STEPS[after:], expected, strict=True):
            assert session.step(tokens).tobytes() == logits.tobytes()
        assert np.array_equal(session.kept(), kept)
        assert all(np.array_equal(array, state[name]) for name, array in session.state.items())


def test_the_file_has_a_fixed_size(session: Session, engine: Engine, tmp_path: Path) -> None:
    sizes = []
    for count in (1, 16, 16):
        session.step(random_tokens(count))
        session.save(tmp_path / "session")
        sizes.append((tmp_path / "session").stat().st_size)
    assert max(sizes) - min(sizes) < 10  # digits of the count
    assert engine.config.cache.nbytes() < max(sizes) < engine.config.cache.nbytes() + 1000
    assert [path.name for path in tmp_path.iterdir()] == ["session"]


def test_saving_twice_replaces_the_file(engine: Engine, saved: Path) -> None:
    session = engine.restore(saved)
    session.step([1])
    session.save(saved)
    seen = session.tokens_seen
    assert engine.restore(saved).tokens_seen == seen


def test_flipped_bytes_of_the_payload(engine: Engine, saved: Path) -> None:
    whole = saved.read_bytes()
    start = len(whole) - engine.config.cache.nbytes()
    for place in [*range(16), *range(start, len(whole), 397), len(whole) - 1]:
        saved.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        with pytest.raises(PackageError, match="session"):
            engine.restore(saved)
    saved.write_bytes(whole)
    for _ in range(4):
        engine.restore(saved)  # no row was lost


def test_flipped_bytes_of_the_header(engine: Engine, saved: Path) -> None:
    whole = saved.read_bytes()
    end = len(whole) - engine.config.cache.nbytes()
    for place in range(end):
        for bit in (1, 4):
            saved.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            with pytest.raises(PackageError, match="session"):
                engine.restore(saved)


def test_a_header_of_many_brackets(engine: Engine, tmp_path: Path) -> None:
    header = b"[" * 60_000
    (tmp_path / "session").write_bytes(b"TRIMKV\0\1" + struct.pack("<Q", len(header)) + header)
    with pytest.raises(PackageError, match="damaged"):
        engine.restore(tmp_path / "session")


@pytest.mark.parametrize("cut", [0, 7, 8, 15, 16, 100, 600, -1])
def test_cut_off_files(engine: Engine, saved: Path, cut: int) -> None:
    saved.write_bytes(saved.read_bytes()[:cut])
    with pytest.raises(PackageError, match=r"damaged|not a session file"):
        engine.restore(saved)


def test_longer_files(engine: Engine, saved: Path) -> None:
    saved.write_bytes(saved.read_bytes() + b"\0")
    with pytest.raises(PackageError, match="damaged"):
        engine.restore(saved)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=80), headed=st.booleans())
def test_any_other_file(engine: Engine, tmp_path: Path, content: bytes, headed: bool) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"TRIMKV\0\1" * headed + content)
    with pytest.raises(PackageError):
        engine.restore(file)


def test_what_cannot_be_read(engine: Engine, tmp_path: Path) -> None:
    for path, said in ((tmp_path / "nothing", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(PackageError, match=said):
            engine.restore(path)


@pytest.mark.parametrize("changes", [{"budget": 7}, {"evict_every": 5}, {"prefill_chunk": 8}])
def test_sessions_of_another_package(checkpoint: Path, saved: Path, tmp_path: Path, changes: dict[str, int]) -> None:
    path = build(checkpoint, tmp_path / "other", **changes).path
    with Engine.open(path) as other, pytest.raises(PackageError, match="saved with another package"):
        other.restore(saved)


def test_restoring_needs_a_free_row(package: Path, saved: Path) -> None:
    with Engine.open(package) as engine, engine.session(), pytest.raises(EngineError, match="rows are in use"):
        engine.restore(saved)


@pytest.mark.parametrize("name", ["missing/session", ".", "x" * 300])
def test_where_nothing_can_be_written(session: Session, tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match="cannot be saved"):
        session.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_keeps_the_old_file(engine: Engine, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, session = saved.read_bytes(), engine.restore(saved)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="No space left on device"):
        session.save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["session"]
