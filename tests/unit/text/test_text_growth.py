"""Tokenizers that make terabytes of a letter, or never come to an end."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from trimkv_export.errors import PackageError
from trimkv_export.text.growth import check_growth
from trimkv_export.text.tokenizer import Tokenizer as OurTokenizer


def backend(**parts: Any) -> Tokenizer:
    made = Tokenizer(models.BPE({"a": 0, "x": 1}, []))
    for name, part in parts.items():
        setattr(made, name, part)
    return made


def template(single: str, ids: list[int]) -> Any:
    tokens = {"x": {"id": "x", "ids": ids, "tokens": ["x"] * len(ids)}}
    made = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    body = json.loads(made.__getstate__())
    pieces = {"A": {"Sequence": {"id": "A", "type_id": 0}}, "x": {"SpecialToken": {"id": "x", "type_id": 0}}}
    body["single"], body["special_tokens"] = [pieces[each] for each in single], tokens
    made.__setstate__(json.dumps(body).encode())
    return made


DOUBLE = normalizers.Replace("a", "aa")
BOMBS: dict[str, dict[str, Any]] = {
    "replace": {"normalizer": normalizers.Sequence([DOUBLE] * 40)},
    "replace at once": {"normalizer": normalizers.Replace("a", "a" * 1000)},
    "nested": {"normalizer": normalizers.Sequence([normalizers.Sequence([DOUBLE] * 4)] * 4)},
    "pattern that may be empty": {"normalizer": normalizers.Sequence([normalizers.Replace(Regex("q*"), "q")] * 40)},
    "pattern that is empty": {"normalizer": normalizers.Sequence([normalizers.Replace(Regex("(?=q)"), "q")] * 40)},
    "prepend": {"normalizer": normalizers.Sequence([normalizers.Prepend("abcd")] * 40)},
    "byte level": {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.ByteLevel()] * 40)},
    "byte level, normalized": {"normalizer": normalizers.Sequence([normalizers.ByteLevel()] * 40)},
    "decoder": {"decoder": decoders.Sequence([decoders.Replace("a", "aa")] * 40)},
    "decoder of suffixes": {"decoder": decoders.Sequence([decoders.BPEDecoder(suffix="")] * 40)},
    "twice the text": {"post_processor": processors.Sequence([template("AA", [1])] * 40)},
    "many tokens": {"post_processor": template("x" * 100 + "A", [1] * 100)},
}


@pytest.mark.parametrize("parts", BOMBS.values(), ids=BOMBS.keys())
def test_bombs_are_refused(parts: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"times as long|tokens around a text"):
        check_growth(backend(**parts), "here")
    backend(**parts).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(PackageError, match=r"tokenizer\.json: "):
        OurTokenizer.open(tmp_path)


def test_long_words() -> None:
    found = Tokenizer(models.WordPiece({"a": 0}, unk_token="a", max_input_chars_per_word=1 << 40))  # noqa: S106
    with pytest.raises(PackageError, match="max_input_chars_per_word must be at most 1,024, got 1099511627776"):
        check_growth(found, "here")


ORDINARY: dict[str, dict[str, Any]] = {
    "Llama 2": {
        "normalizer": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        "decoder": decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
        "post_processor": template("xA", [1]),
    },
    "Qwen": {
        "normalizer": normalizers.NFC(),
        "pre_tokenizer": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(r"\p{N}|\s+"), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
        ),
        "decoder": decoders.ByteLevel(),
        "post_processor": processors.Sequence([processors.ByteLevel(), template("xA", [1])]),
    },
    "T5": {
        "normalizer": normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), "▁")]),
        "pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]),
        "decoder": decoders.Metaspace(),
    },
    "spaces of many kinds": {
        "normalizer": normalizers.Sequence(
            [normalizers.Replace(Regex(each), " ") for each in (r"\s+", r"[\t\r]", r"\n{2,}", r"  ", r"[^\S\n]+")] * 3
        ),
    },
}


@pytest.mark.parametrize("parts", ORDINARY.values(), ids=ORDINARY.keys())
def test_those_of_models_are_taken(parts: dict[str, Any]) -> None:
    check_growth(backend(**parts), "here")
