import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import KERNELS, NATIVE_MODE, build, random_tokens

from trimkv_export.errors import OptionError
from trimkv_export.evaluation import (
    EvaluatedPolicy,
    Question,
    Result,
    Task,
    Text,
    default_budgets,
    evaluate,
    open_variant,
    quality,
)
from trimkv_export.package import Package
from trimkv_export.runtime import Engine


def words(count: int, seed: int) -> str:
    return "".join(chr(97 + token % 26) for token in random_tokens(count, seed))


TEXTS = [Text(words(count, count)) for count in (40, 55, 30)]


def measure(package: Path, *arguments: Any, **options: Any) -> list[Result]:
    return evaluate(package, *arguments, threads=1, **options)


def questions(package: Path, budget: int) -> list[Question]:
    """Two questions on each of two contexts; of each pair the first has the answer that the package gives."""
    out = []
    with Engine.open(package, threads=1) as engine:
        encode, decode = engine.tokenizer.encode, engine.tokenizer.decode
        for context in (words(60, 1), words(60, 2)):
            with engine.session(budget) as session:
                session.prefill(encode(context))
                read = session.snapshot()
            for seed in itertools.count():  # till the answer is text: a model with random weights writes any bytes
                prompt = words(9, seed)
                with engine.resume(read) as session:
                    answer = decode(list(session.generate(encode(prompt), 2)))
                if answer.isascii() and answer.isalnum():
                    break
            out += [Question(prompt, answer, context, "right"), Question(prompt, "~~", context, "wrong")]
    return out


@pytest.mark.parametrize("kernels", KERNELS)
def test_perplexity_is_that_of_single_steps(package: Path, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "MAX_ROWS", 2)
    native = NATIVE_MODE[kernels]
    with Engine.open(package, native=native, threads=1) as engine:
        losses = []
        for text in TEXTS:
            tokens = engine.tokenizer.encode(text.text)
            with engine.session(4) as session:
                for token, following in itertools.pairwise(tokens):
                    logits = session.step([token]).astype(np.float64)
                    losses.append(np.log(np.exp(logits).sum()) - logits[following])
    (found,) = measure(package, TEXTS, ["global"], [4], native=native)
    assert found.perplexity == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    assert found.tokens == 122
    assert found.question_context is None
    assert found.text_context == pytest.approx(125 / 3)
    assert (found.accuracy, found.questions, list(found.answers)) == (None, 0, [])


@pytest.mark.parametrize("kernels", KERNELS)
def test_accuracy(package: Path, kernels: str) -> None:
    asked = questions(package, 8)
    (found,) = measure(package, asked, ["global"], [8], native=NATIVE_MODE[kernels])
    assert (found.accuracy, found.correct, found.questions, found.question_context) == (0.5, 2, 4, 69)
    assert [(answer.id, answer.correct) for answer in found.answers] == [("right", True), ("wrong", False)] * 2
    assert [answer.generated for answer in found.answers[::2]] == [asked[0].answer, asked[2].answer]
    assert (found.perplexity, found.tokens, found.text_context) == (None, 0, None)
    assert "answers" not in found.as_dict()


def test_a_context_is_read_once_for_questions_in_sequence(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[int] = []
    measure(package, questions(package, 8), ["global"], [8], progress=lambda _, done, total: fed.append(done - total))
    steps = np.diff(fed)
    assert steps.tolist() == [11, 11, 60, 11, 11]
    assert fed[-1] == 0


def test_all_policies_and_budgets(package: Path) -> None:
    tasks: list[Task] = [*questions(package, 8), *TEXTS]
    found = measure(package, tasks, budgets=[8, 4, 1000])
    rows = [(result.policy, result.budget) for result in found]
    longest = 60 + 9 + 2
    assert rows == [
        (policy, budget)
        for policy in EvaluatedPolicy
        for budget in ([longest] if policy is EvaluatedPolicy.FULL else [4, 8, 1000])
    ]
    full = found[-1]
    assert all(result.perplexity == pytest.approx(full.perplexity, rel=1e-5) for result in found[2::3])
    assert len({result.perplexity for result in found if result.budget == 4}) == 5
    assert {(result.question_context, result.text_context) for result in found} == {(69, 125 / 3)}


def test_full_is_a_package_with_a_large_budget(package: Path, checkpoint: Path, tmp_path: Path) -> None:
    large = build(checkpoint, tmp_path / "large", budget=64).path
    (expected,) = measure(large, TEXTS, ["global"], [64])
    (found,) = measure(package, TEXTS, ["full"])
    assert found.budget == 55
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-6)


def test_both_kinds_of_kernels_answer_alike(package: Path) -> None:
    tasks: list[Task] = [*questions(package, 8), *TEXTS]
    portable, auto = (measure(package, tasks, budgets=[4, 8], native=native) for native in ("off", "auto"))
    for one, other in zip(portable, auto, strict=True):
        assert one.answers == other.answers
        assert one.perplexity == pytest.approx(other.perplexity, rel=1e-4)


def test_no_session_outgrows_the_tables(package: Path) -> None:
    """The table of a policy that goes by position ends with the longest task."""
    (found,) = measure(package, [Question("ab", " cde"), Text("abcde")], ["recent"], [2])
    assert (found.questions, found.tokens) == (1, 4)
    with (
        open_variant(Package.open(package), EvaluatedPolicy.RECENT, 2, 5) as folder,
        Engine.open(folder, threads=1) as engine,
    ):
        engine.session().prefill([1, 2, 3, 4, 5])


def test_default_budgets(package: Path, checkpoint: Path, tmp_path: Path) -> None:
    assert default_budgets(Package.open(package)) == [1, 2, 4, 8]
    least = build(checkpoint, tmp_path / "least", budget=8, min_tokens_per_head=3).path
    assert default_budgets(Package.open(least)) == [4, 8]


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (40, 120, 0.2553, 0.4217)],
)
def test_the_interval_of_an_accuracy(right: int, asked: int, low: float, high: float) -> None:
    """The bounds are where a share of that size would be 1.96 standard deviations from what was measured."""
    result = Result(EvaluatedPolicy.FULL, 1, right / asked, right, asked, 9.0, None, 0, None, [])
    assert result.accuracy_interval == pytest.approx((low, high), abs=1e-4)
    for bound in result.accuracy_interval or ():
        if 0.001 < bound < 0.999:
            assert abs(right / asked - bound) == pytest.approx(1.96 * (bound * (1 - bound) / asked) ** 0.5, rel=1e-3)


def test_bad_arguments(package: Path) -> None:
    with pytest.raises(OptionError, match=r"policy must be one of global, per_head, recent, .*, got 'newest'"):
        measure(package, TEXTS, ["newest"])
    with pytest.raises(OptionError, match="budget must be a whole number from 1 to 1048576, got 0"):
        measure(package, TEXTS, budgets=[0])
    with pytest.raises(OptionError, match="seed must be a whole number of at least 0, got -1"):
        measure(package, TEXTS, seed=-1)
    with pytest.raises(OptionError, match="there is nothing to evaluate"):
        measure(package, [])
