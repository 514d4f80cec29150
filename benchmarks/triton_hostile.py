"""What hostile requests cost another client of Triton: sixteen at once of huge images and of texts of 4 MiB.

    make test-triton      # once: makes build/triton
    PYTHONPATH=. build/triton/client/bin/python benchmarks/triton_hostile.py [--folder build/triton] [--rounds 3]

While they are read or refused, two other clients ask for one token again and again, of a text and of a small image.
Prints Markdown, and ends with 1 if the first token of a text takes more than 200 ms, the median of each attack. The
longest wait is shown too; it depends on who else uses the machine: the first row has nobody but the two.
"""

import argparse
import base64
import concurrent.futures
import io
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "serving"))
from triton_server import GrpcStream, TritonServer, write_model

LIMIT = 0.2
HOSTILE = 16
TEXT_BYTES = 4 << 20


def picture(mode: str, side: int, kind: str) -> str:
    """A picture of one colour, as base64."""
    file = io.BytesIO()
    Image.new(mode, (side, side)).save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def attacks() -> dict[str, dict[str, object]]:
    """By name: the fields of a request."""
    seen = {"text_input": "look", "max_tokens": 1}
    words = ("lorem ipsum dolor sit amet, " * (TEXT_BYTES // 28 + 1))[:TEXT_BYTES]
    return {
        "nothing, for 10 s": {},
        "1-bit PNG of 13,300 x 13,300": {**seen, "image": [picture("1", 13_300, "PNG")]},
        "1-bit PNG of 8,000 x 8,000": {**seen, "image": [picture("1", 8000, "PNG")]},
        "WebP of 4,000 x 4,000": {**seen, "image": [picture("RGB", 4000, "WEBP")]},
        "four JPEG of 2,800 x 2,800": {**seen, "image": [picture("RGB", 2800, "JPEG")] * 4},
        "words of 4 MiB": {"text_input": words, "max_tokens": 1},
        "one letter, 4 MiB": {"text_input": "a" * TEXT_BYTES, "max_tokens": 1},
        "spaces of 4 MiB": {"text_input": " " * TEXT_BYTES, "max_tokens": 1},
    }


def waits(server: TritonServer, stop: threading.Event, **fields: object) -> list[float]:
    """Seconds to the first token, again and again."""
    found = []
    with GrpcStream(server.grpc) as stream:
        while not stop.is_set():
            started = time.perf_counter()
            stream.send("hello", max_tokens=1, **fields)
            responses = list(stream.responses())
            if "error" in responses[-1][1]:
                raise RuntimeError(responses[-1][1]["error"])
            found.append(responses[0][0] - started)
            time.sleep(0.01)
    return found


def attack(server: TritonServer, fields: dict[str, object]) -> tuple[float, set[int], list[float], list[float]]:
    """Sixteen such requests at once -> seconds they took, their statuses, and the waits of two other clients."""
    stop = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(HOSTILE + 2) as pool:
        text = pool.submit(waits, server, stop)
        image = pool.submit(waits, server, stop, image=picture("RGB", 64, "PNG"))
        try:
            time.sleep(0.5 if fields else 10.0)
            started = time.perf_counter()
            body = dict(fields)
            number = HOSTILE if fields else 0
            done = [pool.submit(server.generate, str(body["text_input"]), **_others(body)) for _ in range(number)]
            statuses = {each.result()[0] for each in done}
            took = time.perf_counter() - started
        finally:
            stop.set()
        return took, statuses, text.result(), image.result()


def _others(fields: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in fields.items() if name != "text_input"}


def main() -> int:
    """Print a table; 1 if a limit does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/triton"))
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    folder, worst = arguments.folder.absolute(), 0.0
    with tempfile.TemporaryDirectory() as work:
        repository = Path(work) / "repository"
        write_model(repository, folder / "seeing" / "package", folder / "model", threads=1)
        with TritonServer(folder, repository) as server:
            before = server.memory()["model"]
            print(
                "| sixteen requests | took | answers | text's first token, p50 / longest | image's | model's memory |"
            )
            print("|---|---|---|---|---|---|")
            for name, fields in attacks().items():
                for _ in range(arguments.rounds):
                    took, statuses, text, image = attack(server, fields)
                    worst = max(worst, float(np.median(text)))
                    figures = [f"{np.median(each) * 1e3:.0f} / {max(each) * 1e3:.0f} ms" for each in (text, image)]
                    grown = (server.memory()["model"] - before) / 1e6
                    print(
                        f"| {name} | {took:.1f} s | {statuses} | {' | '.join(figures)} | +{grown:.0f} MB |", flush=True
                    )
    print(f"\nthe text client waits {worst * 1e3:.0f} ms at most, in the median (limit {LIMIT * 1e3:.0f} ms)")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
