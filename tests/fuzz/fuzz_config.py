"""A package's config.json, changed at random and sealed again: it opens and runs, or is refused by one clear error.

python tests/fuzz/fuzz_config.py --count 100000 --seed 7
"""

import argparse
import collections
import copy
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import build, make_checkpoint, make_visual_checkpoint, sealed

from trimkv_export.config import Precision
from trimkv_export.errors import TrimKVError
from trimkv_export.package import Package
from trimkv_export.policy import CacheSpec, plan_slab
from trimkv_export.runtime import Engine

__all__ = ["main"]

SLOWEST = 10.0  # seconds for one input; far above what a loaded machine takes
DEEPEST = 8  # where changes are made; what they put there may be deeper
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 128, 129, 256, 257, 65536, 10**6, 10**9, 2**31 - 1, 2**31, 2**53, 2**63,
    10**30, 10**400, 0.0, -0.0, 0.5, 1e-45, 1e38, 1e308, -1e308, "", "x", "silu", "global", "fp16", "bf16", "int4",
    "rg", "\0", "../x", "/etc/passwd", "a/../b", "{0.__class__}", "{:>1000000000}", "é" * 300, "x" * 10_000, [], [0],
    [[]], [1] * 300, [1e400], {}, {"a": 1}, {"policy": "global", "budget": 1}, [None], "\ud800",
)  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in nested objects and lists."""
    if path:
        yield path
    if len(path) > DEEPEST:
        return
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from _places(each, (*path, key))


def _change(body: dict[str, Any], random_: random.Random) -> None:
    """One change somewhere: another value, a value of elsewhere, a neighbour of a number, one less, one more."""
    places = list(_places(body))
    path = random_.choice(places)
    holder = body
    for key in path[:-1]:
        holder = holder[key]
    key, old = path[-1], holder[path[-1]]
    kind = random_.randrange(6)
    if kind == 0 and isinstance(holder, dict):
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[random_.choice(("x", "", key + "_", "num_layers", "é"))] = random_.choice(VALUES)
    elif kind == 2 and type(old) in (int, float):
        holder[key] = random_.choice((old + 1, old - 1, old * 2, -old, old * 1000, old * 2**20, old // 3))
    elif kind == 3:
        other = body
        for step in random_.choice(places):
            other = other[step]
        holder[key] = copy.deepcopy(other)
    elif kind == 4:
        deep: Any = old
        for _ in range(random_.choice((1, 3, 50, 400))):
            deep = [deep] if random_.random() < 0.5 else {"a": deep}
        holder[key] = deep
    else:
        holder[key] = random_.choice(VALUES)


def _fit_cache_bytes(body: dict[str, Any]) -> None:
    """Make the size that the file states the one that its values come to, as somebody who knows the format could."""
    try:
        sizes = {name: body["model"][name] for name in ("num_layers", "num_kv_heads", "head_dim")}
        sizes |= {name: body["eviction"][name] for name in ("budget", "evict_every")}
        body["cache_bytes"] = plan_slab(CacheSpec(**sizes, kv_dtype=Precision(body["precision"]).dtype)).nbytes
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        return


def _use(package: Path, *, run: bool) -> None:
    """What a program does with a package."""
    config = Package.open(package).config
    plan_slab(config.cache)
    config.as_dict()
    config.graph_metadata()
    if run:
        with Engine.open(package, native="off", threads=1) as engine, engine.session() as session:
            session.prefill([1, 2, 3])
            list(session.generate([4], 2))


def main(count: int, seed: int, say: Callable[[str], None] = print) -> dict[str, int]:
    """Try `count` inputs.

    Args:
        count: inputs; half of them of a package with a vision tower.
        seed: of the changes; the same seed makes the same inputs.
        say: called with a line at the end.

    Returns:
        How many inputs ended how: "runs", or the name of an error of `trimkv_export.errors`.

    Raises:
        Exception: what no user should see, with the input in a note; also an input that takes longer than `SLOWEST`.
    """
    random_, ends = random.Random(seed), collections.Counter[str]()  # noqa: S311 (not for secrets)
    slowest = 0.0
    with tempfile.TemporaryDirectory(prefix="trimkv-fuzz-") as name:
        folder = Path(name)
        packages = [
            build(make_checkpoint(folder / "text"), folder / "text-package").path,
            build(make_visual_checkpoint(folder / "seeing"), folder / "seeing-package", max_image_tokens=40).path,
        ]
        bodies = [json.loads((package / "config.json").read_text()) for package in packages]
        for index in range(count):
            package, body = packages[index % 2], copy.deepcopy(bodies[index % 2])
            for _ in range(random_.choice((1, 1, 1, 2, 5))):
                _change(body, random_)
            _fit_cache_bytes(body)
            try:
                content = sealed(body)
            except UnicodeEncodeError:  # a lone surrogate, which JSON can only name
                content = json.dumps(body).encode()
            except (ValueError, RecursionError):  # deeper than Python writes
                content = json.dumps(bodies[index % 2]).encode()[:-2] + b', "x": ' + b"[" * 5000
            (package / "config.json").write_bytes(content)
            started = time.perf_counter()
            try:
                _use(package, run=True)
                ends["runs"] += 1
            except TrimKVError as error:
                ends[type(error).__name__] += 1
            except Exception:
                say(f"input {index} of seed {seed}: {content[:3000]!r}")
                raise
            slowest = max(slowest, time.perf_counter() - started)
            if slowest > SLOWEST:
                raise TimeoutError(f"input {index} of seed {seed} took {slowest:.1f} s: {content[:3000]!r}")
    said = ", ".join(f"{times:,} {end}" for end, times in ends.most_common())
    say(f"config.json: {count:,} inputs of seed {seed}: {said}; the slowest took {slowest * 1e3:.0f} ms")
    return dict(ends)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    main(arguments.count, arguments.seed)
