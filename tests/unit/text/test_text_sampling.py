"""Sampler against the logits processors of transformers, and its own promises."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from trimkv_export.errors import EngineError, OptionError
from trimkv_export.text.sampling import Sampler, SamplingOptions, TokenHistory

Logits = npt.NDArray[np.float32]


def make_logits(seed: int, size: int = 200, scale: float = 3.0) -> Logits:
    """No two alike: at the edge of top-p a tie has no defined order."""
    rng = np.random.default_rng(seed)
    distinct = np.unique((rng.standard_normal(2 * size + 8) * scale).astype(np.float32))
    return rng.permutation(distinct)[:size]


def history_of(tokens: Sequence[int], size: int) -> TokenHistory:
    history = TokenHistory(size)
    history.see(tokens)
    return history


def expected_probabilities(logits: Logits, options: SamplingOptions, history: list[int]) -> npt.NDArray[np.float64]:
    """The distribution that `generate` of transformers draws from, computed in float64."""
    ids = torch.tensor([history], dtype=torch.long)
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    processors: list[Any] = []
    if options.repetition_penalty != 1.0 and history:
        processors.append(hf.RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    processors.append(hf.TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        processors.append(hf.TopKLogitsWarper(options.top_k))
    if options.top_p < 1.0:
        processors.append(hf.TopPLogitsWarper(options.top_p))
    if options.min_p > 0.0:
        processors.append(hf.MinPLogitsWarper(options.min_p))
    for processor in processors:
        scores = processor(ids, scores)
    probabilities: npt.NDArray[np.float64] = scores.softmax(-1)[0].numpy()
    return probabilities


@settings(max_examples=300)
@given(
    seed=st.integers(0, 2**32),
    size=st.sampled_from([1, 2, 17, 3000]),
    scale=st.sampled_from([0.01, 1.0, 5.0, 40.0]),
    temperature=st.sampled_from([0.05, 0.6, 1.0, 3.0]),
    top_p=st.sampled_from([0.0, 0.05, 0.5, 0.95, 0.999, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 20, 10000]),
    min_p=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    penalty=st.sampled_from([0.7, 1.0, 1.3]),
    history=st.lists(st.integers(0, 4000), max_size=30),
)
def test_the_distribution_is_that_of_transformers(
    seed: int,
    size: int,
    scale: float,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    penalty: float,
    history: list[int],
) -> None:
    logits = make_logits(seed, size, scale)
    options = SamplingOptions(temperature, top_p, top_k, min_p, penalty)
    sampler = Sampler(options, history_of(history, size))
    probabilities = sampler.probabilities(logits)
    expected = expected_probabilities(logits, options, history)
    np.testing.assert_array_equal(probabilities > 0, expected > 0)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-9, atol=0)


def test_ties_with_the_last_of_top_k_stay() -> None:
    logits = np.array([1, 3, 2, 2, 2, 0], np.float32)
    options = SamplingOptions(temperature=1.0, top_k=2)
    probabilities = Sampler(options).probabilities(logits)
    np.testing.assert_array_equal(np.flatnonzero(probabilities), [1, 2, 3, 4])
    np.testing.assert_allclose(probabilities, expected_probabilities(logits, options, []))


@pytest.mark.parametrize("size", [1, 63, 64, 129, 1000, 151_936])
@pytest.mark.parametrize("top_k", [1, 2, 20, 63, 1000])
def test_top_k_by_groups_is_top_k_by_sorting(size: int, top_k: int) -> None:
    """Also with ties, tokens that cannot be chosen, and all logits alike."""
    rng = np.random.default_rng([size, top_k])
    whole = np.round(rng.standard_normal(size) * 3).astype(np.float32)
    few = np.full(size, -np.inf, np.float32)
    few[rng.integers(size, size=5)] = 1.0
    for logits in (make_logits(1, size), whole, few, np.zeros(size, np.float32)):
        chosen = np.flatnonzero(Sampler(SamplingOptions(temperature=1.0, top_k=top_k)).probabilities(logits))
        least = np.sort(logits)[-min(top_k, size)]
        np.testing.assert_array_equal(chosen, np.flatnonzero((logits >= least) & (logits > -np.inf)))


def test_of_tokens_that_tie_at_top_p_the_first_stay() -> None:
    ties = np.array([0.0, 3.0, 1.0, 3.0, 3.0], np.float32)
    for options in (SamplingOptions(temperature=1.0, top_p=0.0), SamplingOptions(temperature=1.0, top_p=0.0, top_k=3)):
        assert np.flatnonzero(Sampler(options).probabilities(ties)).tolist() == [1]


def test_greedy_takes_the_highest_logit_and_the_lowest_id_on_a_tie() -> None:
    logits = np.array([-1, 5, 2, 5], np.float32)
    assert Sampler(SamplingOptions())(logits) == 1
    assert Sampler(SamplingOptions(top_k=3, top_p=0.5)).probabilities(logits).tolist() == [0, 1, 0, 0]


def test_greedy_heeds_the_repetition_penalty_of_prompt_and_own_tokens() -> None:
    logits = np.array([4.0, 3.9, 3.8, -1.0], np.float32)
    seen = history_of([0, -200, 10**9], 4)  # ids without a logit, such as image placeholders
    sampler = Sampler(SamplingOptions(repetition_penalty=1.5), seen)
    assert [sampler(logits) for _ in range(3)] == [1, 2, 0]


def test_a_negative_logit_is_multiplied_by_the_penalty() -> None:
    sampler = Sampler(SamplingOptions(temperature=1.0, repetition_penalty=2.0), history_of([0, 1], 3))
    probabilities = sampler.probabilities(np.array([-1.0, 1.0, 0.0], np.float32))
    np.testing.assert_allclose(np.log(probabilities / probabilities[2]), [-2.0, 0.5, 0.0], atol=1e-12)


def test_a_seed_repeats_the_draws() -> None:
    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingOptions(temperature=1.0, seed=seed))
        return [sampler(make_logits(step)) for step in range(40)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
    assert draws(None) != draws(None)


def test_draws_follow_the_distribution() -> None:
    sampler = Sampler(SamplingOptions(temperature=0.8, top_p=0.9, seed=1))
    logits = make_logits(3, size=12, scale=1.0)
    probabilities = sampler.probabilities(logits)
    count = 20_000
    frequency = np.bincount([sampler(logits) for _ in range(count)], minlength=12) / count
    assert not frequency[probabilities == 0].any()
    np.testing.assert_allclose(frequency, probabilities, atol=4 * 0.5 / np.sqrt(count))


class HighestDraw:
    """A generator that always gives the largest value below 1."""

    def random(self) -> float:
        return float(np.nextafter(1.0, 0.0))


@pytest.mark.parametrize("size", [1, 3, 10, 1000])
def test_a_draw_next_to_one_still_takes_a_possible_token(size: int) -> None:
    sampler = Sampler(SamplingOptions(temperature=1.0))
    sampler._random = HighestDraw()  # type: ignore[assignment]
    logits = np.concatenate([make_logits(1, size), np.full(5, -np.inf, np.float32)])
    assert sampler(logits) == size - 1


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 0.7])
def test_the_logits_are_left_alone(temperature: float) -> None:
    logits = make_logits(5)
    before = logits.copy()
    logits.flags.writeable = False
    options = SamplingOptions(
        temperature, top_p=0.9, top_k=50, min_p=0.1, repetition_penalty=1.2, presence_penalty=1, logit_bias={3: 1}
    )
    sampler = Sampler(options, history_of(range(100), len(logits)))
    token = sampler(logits)
    assert type(token) is int
    np.testing.assert_array_equal(logits, before)


def test_a_temperature_next_to_zero_is_greedy() -> None:
    logits = make_logits(6)
    assert Sampler(SamplingOptions(temperature=1e-320))(logits) == int(logits.argmax())


def test_a_history_has_one_size() -> None:
    history = TokenHistory(10)
    words = history.words
    for _ in range(50):
        history.see(np.arange(10))
        history.count(3)
    assert history.words is words
    assert words.nbytes == 40
    assert history.chosen(np.arange(10)).tolist() == [0, 0, 0, 50, 0, 0, 0, 0, 0, 0]
    words[3] |= 2**31 - 1  # the most that can be counted
    history.count(3)
    assert int(words[3]) == 2**32 - 1
    history.clear()
    assert not len(history.seen())


def test_presence_and_frequency_count_what_was_chosen() -> None:
    """As OpenAI's API and vLLM have them: tokens of prompts do not count."""
    logits = np.array([5.0, 4.5, 4.0, 1.0], np.float32)

    def chosen(steps: int, **options: float) -> list[int]:
        sampler = Sampler(SamplingOptions(**options), history_of([0, 1], 4))  # type: ignore[arg-type]
        return [sampler(logits) for _ in range(steps)]

    assert chosen(4, presence_penalty=1.5) == [0, 1, 2, 0]
    assert chosen(6, frequency_penalty=0.4) == [0, 0, 1, 0, 1, 2]
    assert chosen(3, presence_penalty=-2.0) == [0, 0, 0]
    history = history_of([0, 1], 4)
    for token in (2, 2, 0):
        history.count(token)
    options = SamplingOptions(1.0, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0)
    found = np.log(Sampler(options, history).probabilities(logits))
    np.testing.assert_allclose(found - found[3], np.array([2.5 - 0.75, 2.25, 2.0 - 1.0, 1.0]) - 1.0)


def test_a_token_that_ends_the_text_is_not_counted() -> None:
    history = TokenHistory(3)
    sampler = Sampler(SamplingOptions(frequency_penalty=2.0), history, ends=frozenset({1}))
    assert [sampler(np.array([0, 9, 0], np.float32)) for _ in range(5)] == [1] * 5
    assert not len(history.seen())


def test_logit_bias() -> None:
    logits = np.array([3.0, 2.0, 1.0, -np.inf], np.float32)
    assert Sampler(SamplingOptions(logit_bias={2: 2.5}))(logits) == 2
    assert Sampler(SamplingOptions(logit_bias={"0": -100, "3": 100}))(logits) == 1  # JSON has no other keys
    probabilities = Sampler(SamplingOptions(1.0, logit_bias={0: -1.0})).probabilities(logits)
    np.testing.assert_allclose(probabilities[:3] / probabilities[0], [1, 1, np.exp(-1)])
    options = SamplingOptions(logit_bias={4: 1.0})
    with pytest.raises(OptionError, match="logit_bias takes token ids from 0 to 3, got 4"):
        Sampler(options, TokenHistory(4))
    with pytest.raises(OptionError, match="logit_bias takes token ids from 0 to 3, got 4"):
        Sampler(options)(logits)


def test_options_keep_a_copy_of_the_bias() -> None:
    given_bias = {1: 2.0}
    options = SamplingOptions(logit_bias=given_bias)
    given_bias[5] = 1.0
    assert options.logit_bias == {1: 2.0}
    assert hash(options) == hash(SamplingOptions())


@pytest.mark.parametrize(
    ("bias", "said"),
    [
        ([1, 2], "must be a mapping"),
        ({-1: 0.0}, "got -1"),
        ({"x": 0.0}, "got 'x'"),
        ({"1" * 30: 0.0}, "got '111"),
        ({True: 0.0}, "got True"),
        ({1.0: 0.0}, "got 1.0"),
        ({1: 0.0, "01": 0.0}, "token 1 twice"),
        ({1: 101}, "of token 1 must be a number from -100 to 100, got 101"),
        ({1: float("nan")}, "got nan"),
        ({1: True}, "got True"),
        ({1: "2"}, "got '2'"),
        ({2**31: 1.0}, "got 2147483648"),
    ],
)
def test_a_bad_logit_bias(bias: Any, said: str) -> None:
    with pytest.raises(OptionError, match="logit_bias") as caught:
        SamplingOptions(logit_bias=bias)
    assert said in str(caught.value)


@pytest.mark.parametrize("top_k", [0, -1])
def test_top_k_that_is_off(top_k: int) -> None:
    logits = make_logits(2)
    assert (Sampler(SamplingOptions(1.0, top_k=top_k)).probabilities(logits) > 0).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "logits",
    [[1.0, np.nan, 2.0], [1.0, np.inf], [-np.inf, -np.inf]],
)
def test_logits_that_cannot_be_used_are_refused(logits: list[float], temperature: float) -> None:
    with pytest.raises(EngineError, match=r"cannot be used: their maximum is (nan|inf|-inf)"):
        Sampler(SamplingOptions(temperature))(np.array(logits, np.float32))


@pytest.mark.parametrize("shape", [(), (0,), (1, 4)])
def test_logits_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(EngineError, match=r"shape \[V\], got"):
        Sampler(SamplingOptions())(np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("temperature", -0.1, "from 0 to 100"),
        ("temperature", float("nan"), "from 0 to 100"),
        ("temperature", float("inf"), "from 0 to 100"),
        ("temperature", "hot", "from 0 to 100"),
        ("temperature", True, "from 0 to 100"),
        ("presence_penalty", 2.1, "from -2 to 2"),
        ("frequency_penalty", float("nan"), "from -2 to 2"),
        ("top_p", 1.01, "from 0 to 1"),
        ("top_p", float("nan"), "from 0 to 1"),
        ("min_p", -1e-9, "from 0 to 1"),
        ("top_k", -2, "of at least -1"),
        ("top_k", 2.0, "of at least -1"),
        ("repetition_penalty", 0.0, "from 0.01 to 100"),
        ("repetition_penalty", float("nan"), "from 0.01 to 100"),
        ("seed", -1, "of at least 0"),
        ("seed", 1.5, "of at least 0"),
    ],
)
def test_values_out_of_range_are_refused(option: str, value: Any, allowed: str) -> None:
    with pytest.raises(OptionError) as caught:
        SamplingOptions(**{option: value})
    message = str(caught.value)
    assert message.startswith(option)
    assert message.endswith(f"{allowed}, got {value!r}")
