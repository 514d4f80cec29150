"""Random requests on a real scheduler: each is refused or answered once, and none harms another.

    python tests/fuzz/fuzz_requests.py [--count 2000] [--seed 0] [PACKAGE]

A request is made of fields that are right, nearly right, or nothing of the kind. What must hold: no exception but
RequestError; one last reply for each request that was taken; no internal error; and now and then a plain request has
the answer that it has alone. PACKAGE: a small one.
"""

import base64
import io
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from fuzzing import Tally, argument_parser
from PIL import Image
from support import build, make_checkpoint, make_visual_checkpoint

from trimkv_export.serving import Reply, RequestError, Scheduler, ServingOptions
from trimkv_export.serving.requests import INPUTS, parse_request, read_tensors

PATIENCE = 120.0
DTYPES: dict[str, Any] = {"BOOL": np.bool_, "INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32}
TEXTS = ["hello", "", " ", "grüß\n", "\x00", "�", "<|im_end|>", "<|endoftext|>", "<|image_pad|>", "a" * 3000, "日本語"]
NUMBERS: list[Any] = [0, 1, -1, 2, 7, 0.5, 1.5, -0.0, 1e30, float("nan"), float("inf"), 2**31, 10**400, 2**64]
ODD: list[Any] = [None, True, "x", "5", [], {}, [1], {"a": 1}, [[[]]], *NUMBERS]
IDS = ["a", "b", "c", "A.1:x_-", "", "../x", "a b", "x" * 129, "\n"]


class Waiting:
    """A client that counts its replies; cancelled from the start, or after the first reply, if it says so."""

    def __init__(self, cancel_after: int | None) -> None:
        self.replies: list[Reply] = []
        self.began = time.perf_counter()
        self.seconds = 0.0
        self.ended = threading.Event()
        self._cancel_after = cancel_after

    def send(self, reply: Reply) -> None:
        self.replies.append(reply)
        if reply.final:
            self.seconds = time.perf_counter() - self.began
            self.ended.set()

    def is_cancelled(self) -> bool:
        return self._cancel_after is not None and len(self.replies) >= self._cancel_after


def main(count: int, seed: int, package: Path) -> Counter[str]:
    """Run so many requests.

    Args:
        count: requests.
        seed: of all choices.
        package: what is served.

    Returns:
        How many requests ended how.

    Raises:
        RuntimeError: something did not hold; it names the seed and the request.
    """
    options = ServingOptions(
        max_sequences=3, queue_limit=12, threads=1, max_tokens=40, default_max_tokens=4, max_conversations=3,
        max_prompt_bytes=2500, max_images=3, max_image_bytes=20_000, max_image_pixels=100_000,
        max_total_pixels=150_000, max_waiting_bytes=40_000, max_context=300, conversation_expiry=5.0, timeout=PATIENCE,
    )  # fmt: skip
    rng, tally = random.Random(seed), Tally(f"requests to {package.name}", seed)  # noqa: S311 (to be repeated)
    outcomes = tally.ends
    scheduler = Scheduler(lambda: options.open_engine(package), options)
    try:
        expected = _plain(scheduler, options)
        open_clients: list[tuple[int, Waiting]] = []
        for index in range(count):
            client = Waiting(rng.choice([None] * 8 + [0, 1]))
            try:
                values, parameters = _request(rng)
                request = parse_request(values, options, parameters)
                scheduler.submit(request, client, rng.choice([None, 0.0, 0.001, 50.0]))
                open_clients.append((index, client))
            except RequestError as error:
                outcomes[f"refused: {error.kind}"] += 1
                _check(error.kind != "internal" and len(str(error)) < 1000, seed, index, error)
            except Exception as error:
                raise RuntimeError(f"seed {seed}, request {index}: {error!r}") from error
            if len(open_clients) > 8 or index == count - 1:
                for number, waiting in open_clients:
                    outcomes[_outcome(waiting, seed, number)] += 1
                    tally.time(number, waiting.seconds)
                open_clients.clear()
            if index % 50 == 49:
                for number, waiting in open_clients:
                    outcomes[_outcome(waiting, seed, number)] += 1
                    tally.time(number, waiting.seconds)
                open_clients.clear()
                _check(_plain(scheduler, options) == expected, seed, index, "a plain request has another answer")
        _check(scheduler.failure is None, seed, count, scheduler.failure)
        counts = scheduler.counts()
        _check((counts.live, counts.queued) == (0, 0), seed, count, counts)
    finally:
        scheduler.close()
    tally.report()
    return outcomes


def _plain(scheduler: Scheduler, options: ServingOptions) -> str:
    client = Waiting(None)
    scheduler.submit(parse_request({"text_input": b"once upon", "max_tokens": 9}, options), client)
    _outcome(client, 0, -1)
    return "".join(reply.text for reply in client.replies)


def _outcome(client: Waiting, seed: int, index: int) -> str:
    _check(client.ended.wait(PATIENCE), seed, index, "it never ended")
    final = [reply for reply in client.replies if reply.final]
    _check(len(final) == 1 and client.replies[-1].final, seed, index, client.replies)
    error = final[0].error
    if error is None:
        return f"answered: {final[0].finish_reason}"
    _check(error.kind != "internal" and len(str(error)) < 1000, seed, index, error)
    return f"ended: {error.kind}"


def _check(holds: bool, seed: int, index: int, what: object) -> None:
    if not holds:
        raise RuntimeError(f"seed {seed}, request {index}: {what}")


def _request(rng: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values of inputs, through tensors as Triton has them or as Python has them, and parameters."""
    values: dict[str, Any] = {}
    if rng.random() < 0.95:
        values["text_input"] = rng.choice(TEXTS).encode() if rng.random() < 0.9 else bytes([rng.randrange(256)] * 3)
    for field in rng.sample(INPUTS, rng.choice([0, 1, 1, 2, 3, 6])):
        values[field.name] = _value(rng, field.name, field.kind, many=field.many)
    if rng.random() < 0.3:
        values["session_id"] = rng.choice(IDS[:3] if rng.random() < 0.8 else IDS).encode()
        values |= {name: True for name in ("session_start", "session_end") if rng.random() < 0.4}
    parameters = {name: rng.choice(ODD) for name in rng.sample(["seed", "top_k", "stop", "x", "triton_x"], 1)}
    parameters = parameters if rng.random() < 0.2 else {}
    if rng.random() < 0.1:
        return values, parameters  # of types that no tensor has
    tensors = {name: array for name, value in values.items() if (array := _tensor(rng, name, value)) is not None}
    return read_tensors(tensors), parameters


def _value(rng: random.Random, name: str, kind: str, *, many: bool) -> Any:
    if rng.random() < 0.05:
        return rng.choice(ODD)
    if many:
        return [_value(rng, name, kind, many=False) for _ in range(rng.choice([0, 1, 1, 2, 5, 20]))]
    if name == "image":
        return _image(rng)
    if name in ("sampling_parameters", "logit_bias", "chat_template_kwargs", "messages"):
        return _json(rng, name)
    if kind == "BOOL":
        return rng.random() < 0.5
    if kind == "STRING":
        return rng.choice(TEXTS).encode()
    return rng.choice(NUMBERS) if rng.random() < 0.3 else rng.choice([1, 2, 7] if kind != "FP32" else [0.3, 0.9, 1.0])


def _json(rng: random.Random, name: str) -> bytes:
    if rng.random() < 0.1:
        return rng.choice([b"", b"{", b"[" * 5000, b"NaN", b"\xff", b'{"a":' * 40 + b"1" + b"}" * 40, b"9" * 5000])
    made: Any
    if name == "messages":
        content = [rng.choice(TEXTS), None, [{"type": "text", "text": rng.choice(TEXTS)}], [{"type": "image"}], 5]
        roles = ["user", "system", "assistant", "tool", "", None, 7]
        made = [{"role": rng.choice(roles), "content": rng.choice(content)} for _ in range(rng.randrange(4))]
    elif name == "logit_bias":
        made = {str(rng.choice([0, 5, 250, 258, 259, 10**9, -1, "x"])): rng.choice(ODD) for _ in range(3)}
    elif name == "chat_template_kwargs":
        made = {rng.choice(["enable_thinking", "tools", "messages", "_x", "a b"]): rng.choice(ODD)}
    else:
        names = [
            "temperature",
            "top_p",
            "top_k",
            "stop",
            "stop_token_ids",
            "logit_bias",
            "ignore_eos",
            "seed",
            "nothing",
        ]
        made = {each: rng.choice(ODD) for each in rng.sample(names, rng.randrange(4))}
    text = json.dumps(made).encode()
    return text[: rng.randrange(len(text))] if rng.random() < 0.05 else text


def _image(rng: random.Random) -> Any:
    file = io.BytesIO()
    side = rng.choice([1, 8, 64, 200, 400])
    size = (side, side) if rng.random() < 0.8 else (1, 4 * side)
    Image.new(rng.choice(["1", "L", "RGB", "RGBA"]), size, 1).save(file, rng.choice(["PNG", "GIF", "TIFF", "WEBP"]))
    raw = bytearray(file.getvalue())
    if rng.random() < 0.4:
        for _ in range(rng.choice([1, 5, 50])):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    if rng.random() < 0.1:
        del raw[rng.randrange(len(raw)) :]
    if rng.random() < 0.5:
        return bytes(raw)
    head = rng.choice([b"", b"data:image/png;base64,", b"data:;charset=x;base64,", b"http://x/", b"data:x,", b"="])
    return head + base64.b64encode(raw)


def _tensor(rng: random.Random, name: str, value: Any) -> Any:
    """The tensor that Triton would hand over, sometimes of another shape; None for what it would refuse."""
    kind = next(field.kind for field in INPUTS if field.name == name)
    found = value if isinstance(value, list) else [value]
    if kind == "STRING":
        array = np.empty((1, len(found)), np.object_)
        array[0] = [each if isinstance(each, bytes) else str(each).encode() for each in found]
        return array
    try:
        with np.errstate(all="ignore"):
            array = np.array([found], DTYPES[kind])
    except (TypeError, ValueError, OverflowError):
        return None
    return array if rng.random() < 0.97 else array.reshape(-1)[:0]


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument(
        "package", type=Path, nargs="?", help="default: small ones, made here: of text, and of pictures"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        packages = [arguments.package]
        if arguments.package is None:
            packages = [
                build(make_checkpoint(Path(folder) / "text"), Path(folder) / "text-package").path,
                build(make_visual_checkpoint(Path(folder) / "seeing"), Path(folder) / "seeing-package").path,
            ]
        for package in packages:
            for outcome, number in sorted(main(arguments.count // len(packages), arguments.seed, package).items()):
                sys.stdout.write(f"{number:8,} {outcome}\n")
