"""What it changes that kernels for CPUs round the inputs of quantised matrices to int8.

Random tokens give a trained model activations that no text does, with channels a thousand times as large as the rest;
rounded together with those, the rest is lost, and logits are off by as much as they are large. So a package's weights,
graph and cache are judged with inputs as they are (`exact_package`), on random tokens, to the tolerance of its floats;
and the kernels that round by how far they are from that on text.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trimkv_export.config import Quantization
from trimkv_export.errors import PackageError
from trimkv_export.graph.variant import decoder_with_exact_inputs
from trimkv_export.package import DECODER, Package
from trimkv_export.package.variant import variant_folder
from trimkv_export.runtime import Engine

__all__ = ["ROUNDING_TOLERANCE", "RoundedSteps", "exact_package", "rounds_inputs", "text_tokens"]

# Root mean square of the differences of a step's logits, as a share of their standard deviation, on average.
# Of a trained model it is 0.05, of small random ones up to 0.3; of logits that have nothing in common, 1.4.
ROUNDING_TOLERANCE = 0.5
MOST_TOKENS, ALONE = 64, 16  # of the text, and how many of them are fed one at a time, at the end
TEXT = (
    "The lighthouse keeper wrote down the weather every evening: the wind, the height of the waves and the ships that "
    "had passed. When a storm came in the spring of that year, the notes of three days were only a few words long, for "
    "he had carried oil up the stairs all night."
)


def rounds_inputs(quantization: Quantization | None) -> bool:
    """Whether kernels for CPUs round inputs of a package's matrices."""
    return quantization is not None and not quantization.qdq


@contextlib.contextmanager
def exact_package(package: Package) -> Iterator[Path]:
    """Yield a folder with the package, whose matrices take their inputs as they are; it is removed afterwards.

    Raises:
        OutputError: the folder cannot be written.
    """
    decoder = decoder_with_exact_inputs(package.path / DECODER)
    with variant_folder(package, package.config, {DECODER: decoder}, "verify", "exact inputs") as folder:
        yield folder


class RoundedSteps:
    """The logits of an engine with exact inputs over a text, and how far another engine is from them.

    Attributes:
        tokens: the text's; where the package has no tokenizer, what the model itself goes on with after one token.
    """

    def __init__(self, exact: Engine, text: Sequence[int] = ()) -> None:
        """exact: an engine of `exact_package`. text: tokens that the engines read."""
        placeholders = exact.config.placeholder_ids
        self.tokens = [token for token in text if token not in placeholders][:MOST_TOKENS]
        self._logits: list[NDArray[np.float32]] = []
        with exact.session() as session:
            if len(self.tokens) < 2:
                start = next(token for token in range(exact.config.model.vocab_size) if token not in placeholders)
                self.tokens = [start, *session.generate([start], MOST_TOKENS - 1, stop_ids=frozenset())]
                session.reset()
            for part in self._parts(exact.config.prefill_chunk):
                self._logits.append(session.step(part))

    def _parts(self, chunk: int) -> Iterator[list[int]]:
        """A text in steps of a chunk, and its end token by token."""
        alone = max(0, len(self.tokens) - ALONE)
        for start in range(0, alone, chunk):
            yield self.tokens[start : min(start + chunk, alone)]
        for token in self.tokens[alone:]:
            yield [token]

    def difference(self, engine: Engine) -> float:
        """How far the logits of another engine of the package are: see `ROUNDING_TOLERANCE`."""
        found = []
        with engine.session() as session:
            for part, expected in zip(self._parts(engine.config.prefill_chunk), self._logits, strict=True):
                distance = session.step(part) - expected
                found.append(float(np.sqrt(np.mean(distance**2)) / max(float(expected.std()), 1e-12)))
        return float(np.mean(found))


def text_tokens(package: Package) -> list[int]:
    """The text that engines are compared on, in the package's tokens; none where it has no tokenizer."""
    try:
        return package.open_tokenizer().encode(TEXT)
    except PackageError:
        return []
