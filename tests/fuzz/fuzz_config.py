"""A package's config.json, changed at random and sealed again: it opens and runs, or is refused by one clear error.

python tests/fuzz/fuzz_config.py --count 100000 --seed 7
"""

import copy
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzzing import Tally, argument_parser, change
from support import build, make_checkpoint, make_visual_checkpoint, sealed

from trimkv_export.config import Precision
from trimkv_export.package import Package
from trimkv_export.policy import CacheSpec, plan_slab
from trimkv_export.runtime import Engine

__all__ = ["main"]


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
        BaseException: as `Tally.input`.
    """
    random_, tally = random.Random(seed), Tally("config.json", seed, say)  # noqa: S311 (not for secrets)
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
                change(body, random_)
            _fit_cache_bytes(body)
            try:
                content = sealed(body)
            except UnicodeEncodeError:  # a lone surrogate, which JSON can only name
                content = json.dumps(body).encode()
            except (ValueError, RecursionError):  # deeper than Python writes
                content = json.dumps(bodies[index % 2]).encode()[:-2] + b', "x": ' + b"[" * 5000
            (package / "config.json").write_bytes(content)
            with tally.input(index, content):
                _use(package, run=True)
    return tally.report()


if __name__ == "__main__":
    arguments = argument_parser(__doc__).parse_args()
    main(arguments.count, arguments.seed)
