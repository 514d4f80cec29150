"""Random steps of sessions that come and go: memory stays flat, and no row ever changes but by its own steps.

    python benchmarks/session_soak.py PACKAGE [--steps 300000] [--seed 1]

Sessions are created, stepped alone and in batches, generate with penalties, are saved and restored, closed and dropped,
in random order. After each action the checksum of every other row is what it was. It prints JSON and ends with 1 if
resident memory grew by more than 2 MB after the first tenth of the steps.
"""

import argparse
import collections
import json
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from trimkv_export.backends.process_memory import status_bytes
from trimkv_export.runtime import Engine, SamplingOptions, Session

ROWS = 8
MOST_GROWTH = 2_000_000
PENALTIES = SamplingOptions(
    temperature=0.9, repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1, min_p=0.01, seed=1
)


def checksum(session: Session) -> int:
    """Of a session's row and history."""
    total = zlib.crc32(session.history.words.tobytes())
    for array in session.state.values():
        total = zlib.crc32(array.tobytes(), total)
    return total


class Soak:
    """The sessions that live, by row, and what their rows held after their last action."""

    def __init__(self, engine: Engine, seed: int, folder: Path) -> None:
        self.engine, self.random, self.file = engine, np.random.default_rng(seed), folder / "session"
        self.sessions: dict[int, Session] = {}
        self.sums: dict[int, int] = {}
        self.done: collections.Counter[str] = collections.Counter()
        self.steps = 0
        self.saved = False

    def tokens(self, most: int) -> list[int]:
        """1 to `most` random tokens."""
        size = int(self.random.integers(1, most + 1))
        return [int(token) for token in self.random.integers(self.engine.config.model.vocab_size, size=size)]

    def any_row(self) -> int:
        """The row of a session, which is made if there is none."""
        if not self.sessions:
            self.add(self.engine.session())
        return int(self.random.choice(list(self.sessions)))

    def add(self, session: Session) -> None:
        """Take in a session."""
        self.sessions[session.row], self.sums[session.row] = session, checksum(session)

    def act(self) -> None:
        """One random action, and a look at all rows."""
        actions: list[tuple[float, Callable[[], list[int]]]] = [
            (0.35, self.step),
            (0.35, self.batch),
            (0.12, self.generate),
            (0.06, self.create),
            (0.03, self.save),
            (0.03, self.restore),
            (0.02, self.copy),
            (0.02, self.close),
            (0.02, self.drop),
        ]
        shares = [share for share, _ in actions]
        action = actions[int(self.random.choice(len(actions), p=shares))][1]
        touched = action()
        self.done[action.__name__] += 1
        for row in touched:
            if row in self.sessions:
                self.sums[row] = checksum(self.sessions[row])
        for row, session in self.sessions.items():
            if checksum(session) != self.sums[row]:
                raise SystemExit(f"row {row} changed in {action.__name__} of rows {touched}")

    def step(self) -> list[int]:
        """A session takes some tokens."""
        row = self.any_row()
        self.sessions[row].step(self.tokens(self.engine.config.prefill_chunk))
        self.steps += 1
        return [row]

    def batch(self) -> list[int]:
        """Several sessions take a token or more, together."""
        self.any_row()
        rows = [row for row in self.sessions if self.random.random() < 0.7] or list(self.sessions)[:1]
        self.engine.step_many([(self.sessions[row], self.tokens(1 + int(self.random.random() < 0.1))) for row in rows])
        self.steps += len(rows)
        return rows

    def generate(self) -> list[int]:
        """A session answers; sometimes the caller stops early."""
        row = self.any_row()
        session = self.sessions[row]
        before = session.tokens_seen
        text = session.generate([*session.pending, *self.tokens(5)], 8, PENALTIES, stop_ids=frozenset())
        for _ in text:
            if self.random.random() < 0.1:
                text.close()
        self.steps += session.tokens_seen - before
        return [row]

    def create(self) -> list[int]:
        """A session begins, if there is a row."""
        if len(self.sessions) < ROWS:
            self.add(self.engine.session(int(self.random.integers(1, self.engine.config.eviction.budget + 1))))
        return []

    def save(self) -> list[int]:
        """A session is written to the file."""
        self.sessions[self.any_row()].save(self.file)
        self.saved = True
        return []

    def restore(self) -> list[int]:
        """A session comes back from the file, if there is one and a row."""
        if self.saved and len(self.sessions) < ROWS:
            self.add(self.engine.restore(self.file))
        return []

    def copy(self) -> list[int]:
        """A session goes on twice, if there is a row."""
        if len(self.sessions) < ROWS:
            self.add(self.engine.resume(self.sessions[self.any_row()].snapshot()))
        return []

    def close(self) -> list[int]:
        """A session ends."""
        self.sessions.pop(self.any_row()).close()
        return []

    def drop(self) -> list[int]:
        """A session is forgotten, sometimes with a text that was not taken to its end."""
        session = self.sessions.pop(self.any_row())
        if self.random.random() < 0.5:
            next(session.generate(self.tokens(3), 4, stop_ids=frozenset()))
            self.steps += 1
        return []


def soak(package: Path, steps: int, seed: int) -> dict[str, object]:
    """Run it and report."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Engine.open(package, max_sessions=ROWS, threads=1, context=2**30) as engine,
    ):
        run, first = Soak(engine, seed, Path(folder)), 0
        while run.steps < steps:
            run.act()
            if not first and run.steps >= steps // 10:
                first = status_bytes("VmRSS")
        last = status_bytes("VmRSS")
        return {
            "steps": run.steps,
            "actions": dict(run.done),
            "native": engine.native,
            "resident_bytes_after_a_tenth": first,
            "resident_bytes_at_the_end": last,
            "growth_bytes": last - first,
        }


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--steps", type=int, default=300_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    report = soak(options.package, options.steps, options.seed)
    print(json.dumps(report, indent=2))
    sys.exit(int(report["growth_bytes"] > MOST_GROWTH))  # type: ignore[operator]


if __name__ == "__main__":
    main()
