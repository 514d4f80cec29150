"""Batches of tokens, made anew for every step from (seed, step), so that a resumed run sees what it would have seen."""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from documents import draw_facts, plant
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

__all__ = ["END_OF_TEXT", "Corpus", "Mix", "make_tokenizer"]

END_OF_TEXT = "<|endoftext|>"
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # each digit is a token of its own
FACTS_SHOWN = 20_000  # to the tokenizer, so that names are a few tokens each


def make_tokenizer(sentences: list[str], vocab_size: int, path: Path) -> Tokenizer:
    """Open the byte-level BPE at `path`, or train it on the sentences and facts and write it there."""
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    rng = random.Random(0)
    facts = [fact for _ in range(FACTS_SHOWN // 10) for fact in draw_facts(rng, 10)]
    shown = [text for fact in facts for text in (" " + fact.sentence, fact.question)]
    tokenizer.train_from_iterator([*(" " + sentence for sentence in sentences), *shown], trainer)
    tokenizer.save(str(path))
    return tokenizer


@dataclass(frozen=True)
class Mix:
    """What a batch is made of.

    Attributes:
        rows, length: its shape.
        facts: facts of a document, on average.
        asked: questions of a document, on average.
        plain: share of rows that are text alone.
        late: all facts are asked, once each and at the end; `asked` makes no difference then.
    """

    rows: int
    length: int
    facts: int
    asked: int
    plain: float
    late: bool = False


class Corpus:
    """Sentences as tokens, and batches of documents made of them."""

    def __init__(self, tokenizer: Tokenizer, sentences: list[str]) -> None:
        self.tokenizer, self.sentences = tokenizer, sentences
        encoded = tokenizer.encode_batch([" " + sentence for sentence in sentences])
        self._tokens = [line.ids for line in encoded]

    def batch(self, seed: int, step: int, mix: Mix) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Tokens [rows, length] and which of them are answers."""
        rng = random.Random(f"{seed} {step}")
        tokens = np.zeros((mix.rows, mix.length), np.int64)
        answers = np.zeros((mix.rows, mix.length), bool)
        for row in range(mix.rows):
            if rng.random() < mix.plain:
                ids = [token for line in self._pieces(rng, mix.length) for token in line]
                tokens[row] = ids[: mix.length]
            else:
                tokens[row], answers[row] = self._document(rng, mix)
        return tokens, answers

    def _pieces(self, rng: random.Random, length: int) -> list[list[int]]:
        """Token lists of a run of sentences, at least `length` tokens together."""
        start = rng.randrange(len(self._tokens))
        out: list[list[int]] = []
        while length > 0:
            out.append(self._tokens[start % len(self._tokens)])
            length -= len(out[-1])
            start += 1
        return out

    def _document(self, rng: random.Random, mix: Mix) -> tuple[list[int], list[bool]]:
        """One document of `mix.length` tokens."""
        length = mix.length
        drawn = draw_facts(rng, rng.randint(1, 2 * mix.facts - 1))
        asked = len(drawn) if mix.late else max(1, mix.asked * len(drawn) // mix.facts)
        strings = [text for fact in drawn for text in (" " + fact.sentence, fact.question, fact.answer)]
        encoded = {text: line.ids for text, line in zip(strings, self.tokenizer.encode_batch(strings), strict=True)}
        newline = self.tokenizer.encode("\n").ids
        planted = sum(len(encoded[" " + fact.sentence]) for fact in drawn) + asked * 22
        pieces = self._pieces(rng, max(16, length - planted))
        lookup = {str(index): piece for index, piece in enumerate(pieces)}
        ids: list[int] = []
        marks: list[bool] = []
        for text, is_answer in plant(rng, list(lookup), drawn, asked, late=mix.late):
            part = lookup.get(text) or encoded.get(text) or newline
            ids += part
            marks += [is_answer] * len(part)
        spare = length - len(ids)
        if spare > 0:
            tail = [token for line in self._pieces(rng, spare) for token in line][:spare]
            ids += tail
            marks += [False] * spare
        return ids[:length], marks[:length]
