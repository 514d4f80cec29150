"""Talk to a served package: text as it comes over gRPC, in a conversation that the server remembers.

    pip install 'tritonclient[grpc]'
    python examples/triton_client.py --model demo "Once upon a time" "And then?"
    python examples/triton_client.py --model demo --image photo.jpg "What is on the left?"

Each prompt is a turn. The server keeps the conversation's cache between turns, and reads only what is new.
"""

import argparse
import queue
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as grpcclient

TYPES = {"STRING": ("BYTES", np.object_), "INT32": ("INT32", np.int32), "BOOL": ("BOOL", np.bool_)}
FIELDS = {
    "text_input": "STRING",
    "image": "STRING",
    "session_id": "STRING",
    "max_tokens": "INT32",
    "stream": "BOOL",
    "chat": "BOOL",
    "session_start": "BOOL",
    "session_end": "BOOL",
}


def tensor(name: str, values: list[Any]) -> Any:
    """An input of shape [1, n]."""
    kind, dtype = TYPES[FIELDS[name]]
    found = grpcclient.InferInput(name, [1, len(values)], kind)
    found.set_data_from_numpy(np.array([values], dtype))
    return found


class Conversation:
    """A conversation with a model, over one gRPC stream. A context manager; its end cancels what is under way."""

    def __init__(self, address: str, model: str) -> None:
        self._model, self._id, self._turns = model, str(uuid.uuid4()), 0
        self._client = grpcclient.InferenceServerClient(address)
        self._responses: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._client.start_stream(lambda result, error: self._responses.put((result, error)))

    def __enter__(self) -> "Conversation":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.stop_stream(cancel_requests=True)  # without it the process would hang at its end
        self._client.close()

    def ask(self, text: str, *, images: list[bytes], max_tokens: int, chat: bool, last: bool) -> Iterator[str]:
        """Pieces of the answer, as they come. Raises RuntimeError with the server's message."""
        fields: dict[str, list[Any]] = {
            "text_input": [text.encode()],
            "max_tokens": [max_tokens],
            "stream": [True],
            "chat": [chat],
            "session_id": [self._id.encode()],
            "session_start": [self._turns == 0],
            "session_end": [last],
        }
        if images:
            fields["image"] = list(images)
        self._client.async_stream_infer(self._model, [tensor(name, values) for name, values in fields.items()])
        self._turns += 1
        while True:
            result, error = self._responses.get()
            if error is not None:
                raise RuntimeError(error.message())
            yield result.as_numpy("text_output")[0, 0].decode()
            if result.as_numpy("finish_reason") is not None:
                return


def main() -> None:
    """Print the answer of each turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", nargs="+", help="one for each turn")
    parser.add_argument("--address", default="localhost:8001", help="the server's gRPC port")
    parser.add_argument("--model", required=True)
    parser.add_argument("--image", type=Path, action="append", default=[], help="for the first turn")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--chat", action="store_true", help="put the prompts into the model's chat template")
    options = parser.parse_args()
    try:
        with Conversation(options.address, options.model) as conversation:
            for turn, prompt in enumerate(options.prompts):
                pieces = conversation.ask(
                    prompt,
                    images=[] if turn else [path.read_bytes() for path in options.image],
                    max_tokens=options.max_tokens,
                    chat=options.chat,
                    last=turn == len(options.prompts) - 1,
                )
                for piece in pieces:
                    print(piece, end="", flush=True)
                print()
    except RuntimeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
