"""Accuracy and perplexity of a package, for each policy and budget."""

import contextlib
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trimkv_export.checks import require_whole
from trimkv_export.errors import OptionError
from trimkv_export.evaluation.policies import EvaluatedPolicy
from trimkv_export.evaluation.tasks import Question, QuestionTokens, Task, Text, question_tokens, text_tokens
from trimkv_export.evaluation.variants import load_editor, open_variant, variant_eviction
from trimkv_export.package import Package
from trimkv_export.policy import plan_slab
from trimkv_export.runtime import Engine
from trimkv_export.runtime.session import MAX_TOKENS
from trimkv_export.text.tokenizer import Tokenizer

__all__ = ["Answer", "Result", "default_budgets", "evaluate"]

# Texts that are read together, as far as their caches stay below so many bytes.
MAX_ROWS, MAX_CACHE_BYTES = 16, 1 << 30
# Standard deviations to either side that 95% of a normal distribution are within.
Z95 = statistics.NormalDist().inv_cdf(0.975)

# (what is being measured, tokens fed, tokens in all)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Answer:
    """What a model went on with after a question.

    Attributes:
        id: of the question.
        expected: the right answer.
        generated: what the model wrote.
    """

    id: str
    expected: str
    generated: str

    @property
    def correct(self) -> bool:
        """Whether it is the right answer, but for space around it."""
        return self.generated.strip() == self.expected.strip()


@dataclass(frozen=True)
class Result:
    """Quality with one policy and budget.

    Attributes:
        policy: what decided which entries stay.
        budget: kept entries per layer and KV head, on average; of the full cache, the longest context.
        accuracy: share of the questions answered right; None without questions, and so is `question_context`.
        correct: questions answered right.
        questions: all questions.
        question_context: tokens of a question's context and prompt, on average.
        perplexity: exp of the mean negative log likelihood of `tokens` tokens; None without texts, and so is
            `text_context`.
        tokens: all tokens of the texts but the first of each.
        text_context: tokens of a text, on average.
        answers: one for each question.
    """

    policy: EvaluatedPolicy
    budget: int
    accuracy: float | None
    correct: int
    questions: int
    question_context: float | None
    perplexity: float | None
    tokens: int
    text_context: float | None
    answers: Sequence[Answer] = field(repr=False)

    @property
    def accuracy_interval(self) -> tuple[float, float] | None:
        """The 95% interval of the accuracy (Wilson's score interval, 1927); None without questions."""
        if self.accuracy is None:
            return None
        share, count, z = self.accuracy, self.questions, Z95
        scale = 1 + z**2 / count
        centre = (share + z**2 / (2 * count)) / scale
        half = z / scale * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
        return max(0.0, centre - half), min(1.0, centre + half)

    def as_dict(self) -> dict[str, Any]:
        """For `eval --json`; without the answers."""
        values = {name: value for name, value in vars(self).items() if name != "answers"}
        return values | {"policy": str(self.policy), "accuracy_interval": self.accuracy_interval}


def default_budgets(package: Package) -> list[int]:
    """Return the package's budget, and a half, a quarter and an eighth of it, as far as the package takes them."""
    eviction = package.config.eviction
    lowest = max(1, eviction.min_tokens_per_head)
    return sorted({eviction.budget >> times for times in range(4) if eviction.budget >> times >= lowest})


def evaluate(
    path: Path | str,
    tasks: Sequence[Task],
    policies: Sequence[EvaluatedPolicy | str] = (),
    budgets: Sequence[int] = (),
    *,
    native: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    progress: Progress = lambda *_: None,
) -> list[Result]:
    """Measure each policy with each budget, the full cache once; results come in that order.

    A question counts as answered if the tokens that follow greedily, as many as the right answer has, are its text. A
    text is fed token by token, as in decoding.

    Args:
        path: the package. What `open_variant` makes of it lies next to it for as long as it is needed.
        tasks: questions, for accuracy, and texts, for perplexity.
        policies: by name or member; default: all.
        budgets: may be larger than the package's; default: `default_budgets`.
        native: as for `Engine.open`.
        threads: as for `Engine.open`.
        seed: of the random policy.
        progress: called after each step with what is being measured, the tokens fed so far, and in all.

    Raises:
        OptionError: a bad policy, budget, seed or text.
        TrimKVError: as `Engine.open` and `open_variant`.
    """
    require_whole("seed", seed)
    load_editor()  # before minutes of work
    package = Package.open(path)
    chosen = [_policy(name) for name in dict.fromkeys(policies or EvaluatedPolicy)]
    asked = sorted(set(budgets or default_budgets(package)))
    for policy, budget in itertools.product(chosen, asked):
        variant_eviction(package.config.eviction, policy, budget)  # before minutes of work
    work = _Work.of(tasks, package.open_tokenizer())
    runs = sum(1 if policy is EvaluatedPolicy.FULL else len(asked) for policy in chosen)
    done, total, results = 0, runs * work.fed, []

    def advance(what: str, count: int) -> None:
        nonlocal done
        done += count
        progress(what, done, total)

    longest = max(work.longest, package.config.eviction.min_tokens_per_head)
    for policy in chosen:
        # More than the longest context evicts nothing either.
        used = {budget: min(budget, longest) for budget in ([longest] if policy is EvaluatedPolicy.FULL else asked)}
        with open_variant(package, policy, max(used.values()), longest, seed) as folder:
            rows = work.rows(plan_slab(Package.open(folder).config.cache).nbytes)
            with Engine.open(
                folder, native=native, threads=threads, context=MAX_TOKENS, max_sessions=rows, vision=False
            ) as engine:
                for budget, kept in used.items():
                    fed = functools.partial(advance, f"{policy} {budget}")
                    answers = list(_answers(engine, kept, work.questions, fed))
                    loss = _loss(engine, kept, work.texts, rows, fed)
                    results.append(work.result(policy, budget, answers, loss))
    return results


def _policy(name: EvaluatedPolicy | str) -> EvaluatedPolicy:
    try:
        return EvaluatedPolicy(name)
    except ValueError:
        raise OptionError(f"policy must be one of {', '.join(EvaluatedPolicy)}, got {name!r}") from None


@dataclass(frozen=True)
class _Work:
    """The tasks as tokens."""

    questions: Sequence[QuestionTokens]
    texts: Sequence[Sequence[int]]

    @classmethod
    def of(cls, tasks: Sequence[Task], tokenizer: Tokenizer) -> "_Work":
        questions: list[QuestionTokens] = []
        for question in (task for task in tasks if isinstance(task, Question)):
            same = questions and questions[-1].question.context == question.context
            questions.append(question_tokens(question, tokenizer, questions[-1] if same else None))
        pieces = [piece for task in tasks if isinstance(task, Text) for piece in text_tokens(task, tokenizer)]
        if not questions and not pieces:
            raise OptionError("there is nothing to evaluate: give a question or a text")
        return cls(questions, pieces)

    @property
    def longest(self) -> int:
        """The most tokens that a session is fed, and one."""
        asked = [len(q.context) + len(q.prompt) + q.new_tokens for q in self.questions]
        return max([*asked, *(len(text) for text in self.texts)])

    @property
    def fed(self) -> int:
        """Tokens that a run feeds."""
        contexts = sum(len(next(group).context) for _, group in _by_context(self.questions))
        asked = sum(len(question.prompt) + question.new_tokens for question in self.questions)
        return contexts + asked + self.scored

    @property
    def scored(self) -> int:
        """Tokens whose likelihood is measured."""
        return sum(len(text) - 1 for text in self.texts)

    def rows(self, cache_bytes: int) -> int:
        """Texts to read together."""
        return max(1, min(len(self.texts), MAX_ROWS, MAX_CACHE_BYTES // cache_bytes))

    def result(self, policy: EvaluatedPolicy, budget: int, answers: Sequence[Answer], loss: float) -> Result:
        correct = sum(answer.correct for answer in answers)
        return Result(
            policy=policy,
            budget=budget,
            accuracy=correct / len(answers) if answers else None,
            correct=correct,
            questions=len(answers),
            question_context=_mean([len(asked.context) + len(asked.prompt) for asked in self.questions]),
            perplexity=float(np.exp(loss / self.scored)) if self.scored else None,
            tokens=self.scored,
            text_context=_mean([len(text) for text in self.texts]),
            answers=answers,
        )


def _mean(counts: Sequence[int]) -> float | None:
    return statistics.fmean(counts) if counts else None


def _by_context(questions: Sequence[QuestionTokens]) -> Iterator[tuple[str, Iterator[QuestionTokens]]]:
    return itertools.groupby(questions, key=lambda entry: entry.question.context)


def _answers(
    engine: Engine, budget: int, questions: Sequence[QuestionTokens], advance: Callable[[int], None]
) -> Iterator[Answer]:
    for _, group in _by_context(questions):
        first, *others = group
        with engine.session(budget) as reading:
            if first.context:
                reading.prefill(first.context)
                advance(len(first.context))
            read = reading.snapshot()
        for entry in (first, *others):
            with engine.resume(read) as session:
                tokens = list(session.generate(entry.prompt, entry.new_tokens))
            advance(len(entry.prompt) + entry.new_tokens)
            yield Answer(entry.question.id, entry.question.answer, engine.tokenizer.decode(tokens))


def _loss(
    engine: Engine, budget: int, texts: Sequence[Sequence[int]], rows: int, advance: Callable[[int], None]
) -> float:
    """Negative log likelihood of all tokens but the first of each text, `rows` texts together."""
    total = 0.0
    for start in range(0, len(texts), rows):
        batch = texts[start : start + rows]
        with contextlib.ExitStack() as stack:
            sessions = [stack.enter_context(engine.session(budget)) for _ in batch]
            for at in range(max(map(len, batch)) - 1):
                live = [(session, text) for session, text in zip(sessions, batch, strict=True) if at + 1 < len(text)]
                logits = np.stack(engine.step_many([(session, text[at : at + 1]) for session, text in live]))
                following = logits[np.arange(len(live)), [text[at + 1] for _, text in live]].astype(np.float64)
                total += float(np.sum(_log_sum_exp(logits) - following))
                advance(len(live))
    return total


def _log_sum_exp(logits: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Of each row of [rows, V]."""
    highest = logits.max(axis=1, keepdims=True)
    sums = np.exp(logits - highest).sum(axis=1, dtype=np.float64)
    return np.asarray(highest[:, 0] + np.log(sums), np.float64)
