"""The text of `build --calibrate`, and what is wrong with some."""

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantized_checkpoints import quantize_checkpoint
from support import build, make_checkpoint

from trimkv_export.errors import CheckpointError, OptionError, TrimKVError
from trimkv_export.quantization import calibration_text
from trimkv_export.quantization.calibration_text import read_calibration_text


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose layers divide into blocks."""
    return make_checkpoint(tmp_path_factory.mktemp("wide"), intermediate=64)


def written(folder: Path, content: bytes) -> Path:
    file = folder / "text.txt"
    file.write_bytes(content)
    return file


def test_tokens_are_the_first_of_the_text(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = "Größe. ".encode() * 100
    text = read_calibration_text(written(tmp_path, content))
    assert text.sha256 == hashlib.sha256(content).hexdigest()
    found = text.tokens(checkpoint / "base", 259)
    assert found.dtype == np.int64
    assert found.shape == (len(content),)
    monkeypatch.setattr(calibration_text, "MOST_TOKENS", 520)
    assert text.tokens(checkpoint / "base", 259).tolist() == found[:520].tolist()


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        (None, {}, "cannot be read: No such file or directory"),
        (b"", {}, "is empty"),
        (b" \n", {}, "is empty"),
        (b"abc\xff", {}, "is not UTF-8 text: byte 0xff at 3"),
        (b"x" * 511, {}, "has 511 tokens; calibration needs 512 or more, and uses up to 16,384"),
        (b"x" * 600, {"precision": "fp16"}, "is for --precision int4 and int8; fp16 rounds no weights"),
    ],
)
def test_texts_that_cannot_be_used(
    wide: Path, tmp_path: Path, content: bytes | None, options: dict[str, Any], said: str
) -> None:
    file = tmp_path / "text.txt" if content is None else written(tmp_path, content)
    with pytest.raises(OptionError, match=re.escape(f"calibrate {file}") + f".*{said}"):
        build(wide, tmp_path / "package", **{"precision": "int4", "calibrate": file} | options)
    assert not (tmp_path / "package").exists()


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be read: Is a directory"):
        read_calibration_text(tmp_path)


@pytest.mark.parametrize(
    ("tokenizer", "vocabulary", "said"),
    [
        (None, 259, "needs a tokenizer.json, and there is none"),
        (b"{}", 259, "tokenizer.json: is not a tokenizer that can be read"),
        (b"", 50, "its tokenizer makes token 87, and the model's vocabulary has 50 tokens"),
    ],
)
def test_tokenizers_that_do_not_serve(
    checkpoint: Path, tmp_path: Path, tokenizer: bytes | None, vocabulary: int, said: str
) -> None:
    text = read_calibration_text(written(tmp_path, b"x" * 600))
    if tokenizer is not None:
        (tmp_path / "tokenizer.json").write_bytes(tokenizer or (checkpoint / "base" / "tokenizer.json").read_bytes())
    with pytest.raises(TrimKVError, match=said) as caught:
        text.tokens(tmp_path, vocabulary)
    assert isinstance(caught.value, CheckpointError)


def test_a_checkpoint_that_is_quantised_already(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "checkpoint", hidden=128, intermediate=256, heads=4, kv_heads=2, head_dim=32)
    quantize_checkpoint(source, "awq")
    file = written(tmp_path, b"x" * 600)
    with pytest.raises(OptionError, match=r"calibrate .*text.txt: .* quantised already \(awq\).*leave out --calibrate"):
        build(source, tmp_path / "package", precision="int4", calibrate=file)
