"""Session files, changed at random and signed again: refused by one clear error, or a state that steps take.

python tests/fuzz/fuzz_session.py --count 100000 --seed 7
"""

import hashlib
import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fuzzing import Tally, argument_parser
from support import build, make_checkpoint, random_tokens

from trimkv_export.policy.invariants import state_fault
from trimkv_export.runtime import Engine

__all__ = ["main"]

WORDS = (0, 1, -1, 8, 32, 64, 2**31 - 1, -(2**31), 1 << 20)


def _forged(whole: bytes, random: np.random.Generator, tail: int) -> bytes:
    """A file with a few changed bits, words, pieces or header fields, and the sha256 that anybody can compute.

    tail: bytes at the end of the payload, with what decides where kernels read.
    """
    (size,) = struct.unpack("<Q", whole[8:16])
    header, payload = json.loads(whole[16 : 16 + size]), bytearray(whole[16 + size : -32])
    for _ in range(random.integers(1, 5)):
        kind = random.integers(4)
        place = int(random.integers(len(payload) - tail if random.integers(2) else 0, len(payload)))
        if kind == 0:
            payload[place] ^= 1 << random.integers(8)
        elif kind == 1:
            place -= place % 4
            payload[place : place + 4] = struct.pack("<i", random.choice(WORDS))
        elif kind == 2:
            length = min(int(random.integers(4, 64)), len(payload) - place)
            other = int(random.integers(len(payload) - length))
            payload[place : place + length] = payload[other : other + length]
        else:
            name = str(random.choice([name for name in header if name != "package"]))
            values: list[Any] = [int(random.choice(WORDS)), float(random.normal()), "8", None, [], [3], True]
            header[name] = values[random.integers(len(values))]
    text = json.dumps(header).encode()
    content = whole[:8] + struct.pack("<Q", len(text)) + text + payload
    return content + hashlib.sha256(content).digest()


def main(count: int, seed: int, say: Callable[[str], object] = print) -> dict[str, int]:
    """Read `count` forged files and step on from those that are taken; returns how often each end was met.

    Raises:
        AssertionError: a step damages a state or another row.
        BaseException: as `Tally.input`.
    """
    random, tally = np.random.default_rng(seed), Tally("session files", seed, say)
    with tempfile.TemporaryDirectory() as folder:
        package = build(make_checkpoint(Path(folder) / "checkpoint"), Path(folder) / "package").path
        file = Path(folder) / "session"
        for native in ("off", "auto"):
            with Engine.open(package, native=native, max_sessions=3, threads=1) as engine:
                with engine.session() as session:
                    session.prefill(random_tokens(37))
                    session.save(file)
                whole, cache = file.read_bytes(), engine.config.cache
                tail = sum(tensor.nbytes for tensor in cache.tensors() if tensor.dtype == "int32")
                neighbours = [engine.session() for _ in range(2)]
                for index, neighbour in enumerate(neighbours):
                    neighbour.prefill(random_tokens(20 + index))
                before = [neighbour.snapshot() for neighbour in neighbours]
                for index in range(count // 2):
                    file.write_bytes(_forged(whole, random, tail))
                    tokens = random_tokens(int(random.integers(1, 17)))
                    with tally.input(index, f"native {native}"), engine.restore(file) as session:
                        session.step(tokens)
                        if fault := state_fault(session.state, cache):
                            raise AssertionError(f"input {index} of seed {seed}, native {native}: {fault}")
                if [neighbour.snapshot() for neighbour in neighbours] != before:
                    raise AssertionError(f"seed {seed}, native {native}: another row has changed")
    ends = tally.report()
    if others := ends.keys() - {"runs", "PackageError"}:
        raise AssertionError(f"seed {seed}: {sorted(others)}")
    return ends


if __name__ == "__main__":
    arguments = argument_parser(__doc__).parse_args()
    main(arguments.count, arguments.seed)
