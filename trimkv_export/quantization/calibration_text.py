"""The text on which calibration runs the model."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimkv_export.errors import CheckpointError, OptionError, missing
from trimkv_export.files import read_text

__all__ = ["CalibrationText", "read_calibration_text"]

# A mean of thousands of tokens hardly changes with more: AWQ's authors find 16 sequences enough (section 5.3).
MOST_TOKENS = 16384
LEAST_TOKENS = 512


@dataclass(frozen=True)
class CalibrationText:
    """A text file, and the hexadecimal sha256 of its bytes."""

    path: Path
    text: str
    sha256: str

    def tokens(self, folder: Path, vocab_size: int) -> NDArray[np.int64]:
        """The first tokens of the text, at most `MOST_TOKENS`, by the tokenizer of a checkpoint's folder.

        Raises:
            OptionError: the text has less than `LEAST_TOKENS`.
            CheckpointError: the tokenizer cannot be read, or is of another model.
            MissingDependencyError: the `tokenizers` package is not installed.
        """
        ids = _tokenizer(folder).encode_batch_fast([self.text])[0].ids
        if len(ids) < LEAST_TOKENS:
            raise OptionError(
                f"calibrate {self.path}: this text has {len(ids)} tokens; calibration needs {LEAST_TOKENS:,} or more, "
                f"and uses up to {MOST_TOKENS:,}"
            )
        if max(ids) >= vocab_size:
            raise CheckpointError(
                f"{folder}: its tokenizer makes token {max(ids)}, and the model's vocabulary has {vocab_size} tokens; "
                "they are of different models"
            )
        return np.array(ids[:MOST_TOKENS], np.int64)


def read_calibration_text(path: Path) -> CalibrationText:
    """Read a file of text.

    Raises:
        OptionError: it cannot be read, is empty or is not UTF-8.
    """
    text = read_text(path, "calibrate")
    if not text.strip():
        raise OptionError(f"calibrate {path}: is empty; calibration runs the model on this text")
    return CalibrationText(path, text, hashlib.sha256(text.encode()).hexdigest())


def _tokenizer(folder: Path) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise missing("calibration", "tokenizers", "runtime") from None
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{folder}: calibration needs a tokenizer.json, and there is none")
    try:
        found = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more specific
        raise CheckpointError(f"{file}: is not a tokenizer that can be read: {error}") from None
    found.no_truncation()
    found.no_padding()
    return found
