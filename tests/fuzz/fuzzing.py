"""What the scripts of this folder share: their options, how JSON is changed, and a count of how inputs end."""

import argparse
import collections
import contextlib
import copy
import faulthandler
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from trimkv_export.backends.process_memory import status_bytes
from trimkv_export.errors import TrimKVError

__all__ = ["Tally", "argument_parser", "change"]

SLOWEST = 30.0  # seconds for one input; far above what a loaded machine takes
DEEPEST = 8  # where changes are made; what they put there may be deeper
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 128, 129, 256, 257, 65536, 10**6, 10**9, 2**31 - 1, 2**31, 2**53, 2**63,
    10**30, 10**400, 0.0, -0.0, 0.5, 1e-45, 1e38, 1e308, -1e308, "", "x", "silu", "global", "fp16", "bf16", "int4",
    "rg", "\0", "../x", "/etc/passwd", "a/../b", "{0.__class__}", "{:>1000000000}", "é" * 300, "x" * 10_000, [], [0],
    [[]], [1] * 300, [1e400], {}, {"a": 1}, {"policy": "global", "budget": 1}, [None], "\ud800",
)  # fmt: skip


def argument_parser(about: str, count: int = 2000) -> argparse.ArgumentParser:
    """The options of every script: --count and --seed. A crash prints where it was, for nothing else would."""
    faulthandler.enable()
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=count, help="inputs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed makes the same inputs (default: 0)")
    return parser


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in nested objects and lists."""
    if path:
        yield path
    if len(path) > DEEPEST:
        return
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from _places(each, (*path, key))


def change(body: dict[str, Any], random_: random.Random, values: tuple[Any, ...] = VALUES) -> None:
    """One change somewhere: another value, a value of elsewhere, a neighbour of a number, one less, one more."""
    found = list(_places(body))
    if not found:
        body["x"] = copy.deepcopy(random_.choice(values))
        return
    path = random_.choice(found)
    holder = body
    for key in path[:-1]:
        holder = holder[key]
    key, old = path[-1], holder[path[-1]]
    kind = random_.randrange(6)
    if kind == 0 and isinstance(holder, dict):
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[random_.choice(("x", "", f"{key}_", "num_layers", "é"))] = copy.deepcopy(random_.choice(values))
    elif kind == 2 and type(old) in (int, float):
        holder[key] = random_.choice((old + 1, old - 1, old * 2, -old, old * 1000, old * 2**20, old // 3))
    elif kind == 3:
        other: Any = body
        for step in random_.choice(found):
            other = other[step]
        holder[key] = copy.deepcopy(other)
    elif kind == 4:
        deep: Any = old
        for _ in range(random_.choice((1, 3, 50, 400))):
            deep = [deep] if random_.random() < 0.5 else {"a": deep}
        holder[key] = deep
    else:
        holder[key] = copy.deepcopy(random_.choice(values))


class Tally:
    """How inputs ended.

    Attributes:
        ends: "runs", or the name of an error of `trimkv_export.errors`, and how often.
        slowest: seconds of the slowest input.
    """

    def __init__(self, what: str, seed: int, say: Callable[[str], object] = print) -> None:
        """Begin.

        Args:
            what: the inputs, in a word or two.
            seed: of the changes.
            say: called with lines for a person.
        """
        self.ends = collections.Counter[str]()
        self.slowest, self._slowest_input = 0.0, ""
        self._what, self._seed, self._say = what, seed, say
        self._memory = status_bytes("VmHWM")

    @contextlib.contextmanager
    def input(self, index: int, content: object) -> Iterator[None]:
        """Around the use of an input; what ends it as a user may see is counted.

        Raises:
            BaseException: what no user should see, a panic of a library too, after a line with the input.
            TimeoutError: it took longer than SLOWEST.
        """
        started = time.perf_counter()
        try:
            yield
            self.ends["runs"] += 1
        except TrimKVError as error:
            self.ends[type(error).__name__] += 1
            if len(str(error)) > 2000:
                raise RuntimeError(f"input {index} of seed {self._seed}: a message of {len(str(error)):,}") from error
        except BaseException:
            self._say(f"{self._what}, input {index} of seed {self._seed}: {repr(content)[:3000]}")
            raise
        self.time(index, time.perf_counter() - started, content)

    def time(self, index: int, seconds: float, content: object = "") -> None:
        """Count the seconds of an input. Raises TimeoutError for more than SLOWEST."""
        if seconds > self.slowest:
            self.slowest, self._slowest_input = seconds, f"{index}, {repr(content)[:200]}"
        if seconds > SLOWEST:
            raise TimeoutError(
                f"{self._what}, input {index} of seed {self._seed} took {seconds:.1f} s: {repr(content)[:3000]}"
            )

    def report(self) -> dict[str, int]:
        """Say what there was -> how many inputs ended how."""
        said = ", ".join(f"{times:,} {end}" for end, times in sorted(self.ends.items(), key=lambda each: -each[1]))
        grown = (status_bytes("VmHWM") - self._memory) / 1e6
        self._say(
            f"{self._what}: {self.ends.total():,} inputs of seed {self._seed}: {said}; the slowest took "
            f"{self.slowest * 1e3:.0f} ms; the process's peak grew by {grown:.0f} MB. The slowest: "
            f"{self._slowest_input}"
        )
        return dict(self.ends)
