"""How much a stranger's tokenizer may make of a text.

Each step of a tokenizer.json may write more than it reads, and steps can follow each other: forty that write "aa" for
"a" make a terabyte of one letter, in a library that ends the process when memory does. So what a tokenizer's steps come
to, one after the other, is bounded before a text goes through them. Those of models at most double a text.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from trimkv_export.errors import PackageError

__all__ = ["check_growth"]

MOST_TIMES = 64
# Tokens that are put around a text, and characters of a word that is looked up piece by piece (WordPiece).
MOST_ADDED, MOST_WORD = 4096, 1024
INNER = ("normalizers", "pretokenizers", "decoders", "processors")
# Steps that write no more than they read. Of the others, each may double it; Unicode's normal forms do so once.
SHRINKING = frozenset({
    "BertNormalizer", "ByteFallback", "Digits", "Fuse", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled",
    "Punctuation", "Split", "Strip", "StripAccents", "UnicodeScripts", "Whitespace", "WhitespaceSplit",
})  # fmt: skip
# Patterns that match a character at least: ordinary ones, classes and sets of them, once or more.
ATOM = r"(?:[^\\()|*?{}^$\[\]+.]|\\[sSdDwWnrt]|\[[^\[\]]+\])(?:\+|\{[1-9][0-9]*,?[0-9]*\})?"
MATCHES_SOMETHING = re.compile(f"(?:{ATOM})+")


def check_growth(backend: Any, where: str) -> None:
    """Refuse a tokenizer that makes far more of a text than any model's does.

    Args:
        backend: a `tokenizers.Tokenizer`.
        where: begins the message.

    Raises:
        PackageError: it does.
    """
    kinds = {name: getattr(backend, name) for name in ("normalizer", "pre_tokenizer", "decoder", "post_processor")}
    for name, part in kinds.items():
        times = 1
        for step in _steps(json.loads(part.__getstate__())) if part is not None else ():
            if name == "post_processor":
                times *= _sequences(step, where)
            else:
                times *= _times(step)
            if times > MOST_TIMES:
                raise PackageError(
                    f"{where}: the steps of its {name} may make a text more than {MOST_TIMES} times as long; copy "
                    "tokenizer.json from the checkpoint again"
                )
    longest = getattr(backend.model, "max_input_chars_per_word", 0)
    if longest > MOST_WORD:
        raise PackageError(f"{where}: max_input_chars_per_word must be at most {MOST_WORD:,}, got {longest}")


def _steps(state: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A part of a tokenizer without the sequences in it."""
    inner = next((state[name] for name in INNER if name in state), None)
    if inner is None:
        yield state
    for part in inner or ():
        yield from _steps(part)


def _times(step: Mapping[str, Any]) -> int:
    """How many times as long as a text what a step makes of it can be, roughly."""
    if step["type"] != "Replace":
        return 1 if step["type"] in SHRINKING else 2 + len(step.get("prepend", "")) // 2
    written = len(step["content"])
    if (literal := step["pattern"].get("String")) is not None:
        return max(1, -(-written // len(literal))) if literal else written + 1
    return max(1, written) if MATCHES_SOMETHING.fullmatch(step["pattern"]["Regex"]) else written + 1


def _sequences(step: Mapping[str, Any], where: str) -> int:
    """How often a step puts the text into its result. Raises PackageError if it adds more tokens than any does."""
    if step["type"] != "TemplateProcessing":
        return 1
    tokens = {name: len(token["ids"]) for name, token in step["special_tokens"].items()}
    added = [tokens.get(piece["SpecialToken"]["id"], 0) for piece in step["single"] if "SpecialToken" in piece]
    if (total := sum(added)) > MOST_ADDED:
        raise PackageError(f"{where}: it puts {total:,} tokens around a text; at most {MOST_ADDED:,} are taken")
    return max(1, len(step["single"]) - len(added))
