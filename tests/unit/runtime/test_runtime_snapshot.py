"""Sessions on disk: they go on exactly where they were, and nothing damaged or forged is read."""

import hashlib
import json
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

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
    fixed = engine.config.cache.nbytes() + 4 * engine.config.model.vocab_size
    assert fixed < max(sizes) < fixed + 1000
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
    (tmp_path / "session").write_bytes(b"TRIMKV\0\2" + struct.pack("<Q", len(header)) + header)
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
    file.write_bytes(b"TRIMKV\0\2" * headed + content)
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
    with pytest.raises(OutputError, match=r"is a folder|cannot be written"):
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


def resigned(whole: bytes, payload: bytes | None = None, **changes: Any) -> bytes:
    """A session file with other contents, and the sha256 that anybody can compute."""
    (size,) = struct.unpack("<Q", whole[8:16])
    header = json.loads(whole[16 : 16 + size])
    text = json.dumps({name: value for name, value in (header | changes).items() if value is not ...}).encode()
    content = whole[:8] + struct.pack("<Q", len(text)) + text + (payload or whole[16 + size : -32])
    return content + hashlib.sha256(content).digest()


PENDING: list[Any] = [3, [259], [-1], [1, 2], ["1"], [True], [1.0], [[]], None, {}, ...]


def payload_of(whole: bytes) -> bytearray:
    return bytearray(whole[16 + struct.unpack("<Q", whole[8:16])[0] : -32])


@pytest.mark.parametrize(
    "changes",
    [
        *({"budget": budget} for budget in (0, 9, -1, 8.0, "8", None, True, 10**400, ...)),
        *({"tokens_seen": seen} for seen in (36, -1, [38], ...)),
        *({"next_position": position} for position in (36, -1, 10**12, "37", ...)),
        *({"package": package} for package in (3, "", ...)),
        *({"pending": value} for value in PENDING),
        {"more": 1},
    ],
)
def test_forged_headers(engine: Engine, saved: Path, changes: dict[str, Any]) -> None:
    saved.write_bytes(resigned(saved.read_bytes(), **changes))
    for _ in range(5):  # more often than there are rows
        with pytest.raises(PackageError) as error:
            engine.restore(saved)
        assert len(str(error.value)) < 400
    assert len([engine.session() for _ in range(4)]) == 4


def test_a_signed_file_that_is_sound_is_read(engine: Engine, saved: Path) -> None:
    whole = saved.read_bytes()
    assert resigned(whole) == whole
    engine.restore(saved)


def test_history_and_pending_are_saved(engine: Engine, session: Session, tmp_path: Path) -> None:
    list(session.generate(random_tokens(20), 15, stop_ids=frozenset()))
    session.save(tmp_path / "session")
    restored = engine.restore(tmp_path / "session")
    assert np.array_equal(restored.history.words, session.history.words)
    assert int(restored.history.chosen(restored.history.seen()).sum()) == 15
    assert restored.pending == session.pending
    assert restored.snapshot() == session.snapshot()
    restored.step([1])
    assert not np.array_equal(restored.history.words, session.history.words)  # a copy


def test_a_history_of_another_size(engine: Engine, saved: Path) -> None:
    payload = payload_of(saved.read_bytes())
    saved.write_bytes(resigned(saved.read_bytes(), bytes(payload[4:])))
    with pytest.raises(PackageError, match="damaged"):
        engine.restore(saved)


@pytest.mark.parametrize(("version", "said"), [(1, "an earlier one wrote it: prefill"), (0, "not a"), (3, "not a")])
def test_files_of_other_versions(engine: Engine, saved: Path, version: int, said: str) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(whole[:7] + bytes([version]) + whole[8:])
    with pytest.raises(PackageError, match=f"not a session file of this version.*|{said}") as error:
        engine.restore(saved)
    assert ("an earlier one" in str(error.value)) == (version == 1)


def test_what_is_not_a_file_is_neither_read_nor_replaced(engine: Engine, session: Session, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OutputError, match="is a device or a pipe: name an ordinary file"):
        session.save(pipe)
    with pytest.raises(PackageError, match="is not a file"):
        engine.restore(pipe)
    with pytest.raises(PackageError, match="is not a file"):
        engine.restore("/dev/zero")
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
    assert pipe.is_fifo()


def test_a_long_name_that_the_system_takes(engine: Engine, session: Session, tmp_path: Path) -> None:
    session.save(tmp_path / ("x" * 255))
    engine.restore(tmp_path / ("x" * 255))


def test_paths_with_a_nul_byte(engine: Engine, session: Session) -> None:
    with pytest.raises(OutputError, match=r"cannot be written: .*null byte"):
        session.save("a\0b")
    with pytest.raises(PackageError, match="cannot be read: embedded null byte"):
        engine.restore("a\0b")


def test_a_neighbours_keys(engine: Engine, saved: Path) -> None:
    """Counters of a state with as many recent tokens as reach into the next row."""
    payload = payload_of(saved.read_bytes())
    payload[-16:] = struct.pack("<4i", 40, 0, 40, 0)
    saved.write_bytes(resigned(saved.read_bytes(), bytes(payload), tokens_seen=40, next_position=40))
    with pytest.raises(PackageError, match="damaged or forged: counters"):
        engine.restore(saved)


def test_resuming_another_packages_snapshot(engine: Engine, session: Session) -> None:
    session.step([1, 2, 3])
    snapshot = session.snapshot()
    assert engine.resume(snapshot).tokens_seen == 3
    with pytest.raises(PackageError, match="another package"):
        engine.resume(replace(snapshot, package="0" * 64))
    engine.resume(snapshot)
    engine.resume(snapshot)  # the last row: none was lost


def test_a_load_that_fails_gives_the_row_back(
    engine: Engine, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.step([1])
    snapshot = session.snapshot()
    monkeypatch.setattr(Session, "load", lambda *_: (_ for _ in ()).throw(MemoryError()))
    for _ in range(5):
        with pytest.raises(MemoryError):
            engine.resume(snapshot)
