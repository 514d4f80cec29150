"""Every RoPE kind against transformers, and values that come to no angles."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from trimkv_export.errors import CheckpointError, TrimKVError, UnsupportedModelError
from trimkv_export.models.base import ConfigReader, Rope, read_rope
from trimkv_export.models.base.rope import KINDS

WHERE = Path("somewhere/config.json")
HEAD_DIM, MAX_POSITION, ORIGINAL, THETA = 32, 512, 64, 500000.0
LISTS = {
    "short_factor": np.linspace(1.0, 1.5, HEAD_DIM // 2).tolist(),
    "long_factor": np.linspace(1.5, 8.0, HEAD_DIM // 2).tolist(),
}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 3.0}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": ORIGINAL}
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": ORIGINAL, **LISTS}
OF_EACH_KIND: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"}, "linear": LINEAR, "llama3": LLAMA3, "yarn": YARN, "longrope": LONGROPE,
}  # fmt: skip
HALF = {"partial_rotary_factor": 0.5}
HALF_LISTS = {key: values[: HEAD_DIM // 4] for key, values in LISTS.items()}
CASES: dict[str, dict[str, Any]] = OF_EACH_KIND | {
    "default_partial": {"rope_type": "default", **HALF},
    "linear_partial": LINEAR | HALF,
    "llama3_partial": LLAMA3 | HALF,
    "llama3_8b": LLAMA3 | {"original_max_position_embeddings": 8192},
    "yarn_partial": YARN | HALF,
    "yarn_attention_factor": YARN | {"attention_factor": 0.75},
    "yarn_betas": YARN | {"beta_fast": 8, "beta_slow": 2.0},
    "yarn_mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn_one_mscale": YARN | {"mscale": 0.7},
    "yarn_not_truncated": YARN | {"truncate": False},
    "yarn_no_stretch": YARN | {"factor": 0.5},
    "yarn_factor_of_lengths": YARN | {"factor": None},
    "longrope_partial": LONGROPE | HALF | HALF_LISTS,
    "longrope_attention_factor": LONGROPE | {"attention_factor": 1.25},
    "longrope_factor": LONGROPE | {"factor": 2.0},
    "longrope_no_stretch": LONGROPE | {"original_max_position_embeddings": MAX_POSITION},
}


def read(parameters: dict[str, Any] | None = None, context: int | None = None, **config: Any) -> Rope:
    config = {"max_position_embeddings": MAX_POSITION, "rope_theta": THETA, "rope_scaling": parameters} | config
    return read_rope(ConfigReader(config, WHERE, context), HEAD_DIM)


def reference(parameters: dict[str, Any], length: int) -> tuple[torch.Tensor, float]:
    """What transformers computes: inverse frequencies, and the factor of cosine and sine."""
    config = LlamaConfig(
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITION,
        rope_parameters=copy.deepcopy(parameters) | {"rope_theta": THETA},  # which it writes into
    )
    kind = parameters["rope_type"]
    compute = ROPE_INIT_FUNCTIONS.get(kind, Phi3RotaryEmbedding.compute_default_rope_parameters)
    found: tuple[torch.Tensor, float] = compute(config, torch.device("cpu"), seq_len=length)
    return found


@pytest.mark.parametrize("context", [ORIGINAL, ORIGINAL + 1, None])
@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_transformers(case: str, context: int | None) -> None:
    rope = read(CASES[case], context)
    frequencies, scaling = reference(CASES[case], context or MAX_POSITION)
    np.testing.assert_allclose(rope.inverse_frequencies, frequencies.numpy(), rtol=1e-6)
    assert rope.attention_scaling == pytest.approx(scaling, rel=1e-12)
    assert rope.rotary_dim == HEAD_DIM * CASES[case].get("partial_rotary_factor", 1)
    assert (rope.rope_type, rope.axes) == (CASES[case]["rope_type"], None)


@pytest.mark.parametrize("kind", KINDS)
def test_both_styles_of_config(kind: str) -> None:
    parameters = OF_EACH_KIND[kind]
    named = {"type" if key == "rope_type" else key: value for key, value in parameters.items()}
    inside = parameters | {"rope_theta": THETA}
    assert read(parameters) == read(named) == read(rope_parameters=inside, rope_theta=9.0)
    assert read(parameters | HALF | HALF_LISTS) == read(parameters | HALF_LISTS, partial_rotary_factor=0.5)
    beside = {key: value for key, value in parameters.items() if key != "original_max_position_embeddings"}
    assert read(parameters) == read(beside, original_max_position_embeddings=ORIGINAL)
    assert read(parameters) == read(
        beside | {"original_max_position_embeddings": 7}, original_max_position_embeddings=ORIGINAL
    )


def test_aliases() -> None:
    assert read({"type": "mrope"}) == read()
    assert read(LONGROPE | {"rope_type": "su"}) == read(LONGROPE)


def test_longrope_has_one_list() -> None:
    short, long = read(LONGROPE, ORIGINAL), read(LONGROPE, ORIGINAL + 1)
    assert (short.max_position, long.max_position) == (ORIGINAL, None)
    assert short.attention_scaling == long.attention_scaling > 1
    powers = 1 / np.array(read().inverse_frequencies)
    for rope, factors in ((short, LISTS["short_factor"]), (long, LISTS["long_factor"])):
        np.testing.assert_allclose(1 / (np.array(rope.inverse_frequencies) * powers), factors, rtol=1e-6)
    assert read(LONGROPE) == long
    assert read(LONGROPE | {"long_factor": "not read"}, ORIGINAL) == short


@pytest.mark.parametrize("name", ["dynamic", "proportional", "axial", "", None, ["linear"], {"linear": 1}, 3])
def test_other_kinds_are_refused_by_name(name: Any) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        read({"rope_type": name, "factor": 4.0})
    supported = "default, linear, llama3, longrope, yarn"
    assert str(error.value) == f"{WHERE}: rope_type {name!r} is not supported; supported: {supported}"


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"rope_type": "linear"}, "'rope_scaling.factor' must be a number above 0, got None"),
        (LINEAR | {"factor": 0}, "'rope_scaling.factor' must be a number above 0, got 0"),
        (LINEAR | {"factor": "4"}, "'rope_scaling.factor' must be a number above 0, got '4'"),
        (LINEAR | {"factor": 1e39}, "'rope_scaling.factor' must be in the range of float32, got 1e+39"),
        (LINEAR | {"factor": 10**400}, "'rope_scaling.factor' must be in the range of float32, got 1000"),
        (LINEAR | {"rope_theta": float("inf")}, "'rope_scaling.rope_theta' must be in the range of float32, got inf"),
        (LINEAR | {"rope_theta": -1}, "'rope_scaling.rope_theta' must be a number above 0, got -1"),
        (LINEAR | {"partial_rotary_factor": True}, "'rope_scaling.partial_rotary_factor' .* got True"),
        (LINEAR | {"rope_theta": 3e38, "factor": 1e10}, "rope_theta 3e+38 with .*'factor': 10000000000.0.* float32"),
        (LINEAR | {"rope_theta": 1e-30, "factor": 1e-30}, "rope_theta 1e-30 with .*'factor': 1e-30.* float32"),
        (LLAMA3 | {"factor": None}, "'rope_scaling.factor' must be a number above 0, got None"),
        (LLAMA3 | {"low_freq_factor": float("nan")}, "'rope_scaling.low_freq_factor' .* got nan"),
        (LLAMA3 | {"high_freq_factor": 1}, r"'rope_scaling.high_freq_factor' must be above low_freq.* \(1.0\), got 1"),
        (LLAMA3 | {"original_max_position_embeddings": 8192.0}, "'rope_scaling.original_max_.*' .* got 8192.0"),
        (YARN | {"rope_theta": 1}, "'rope_theta' must be above 1 for yarn, got 1"),
        (YARN | {"rope_theta": 0.5}, "'rope_theta' must be above 1 for yarn, got 0.5"),
        (YARN | {"factor": False}, "'rope_scaling.factor' .* got False"),
        (YARN | {"beta_fast": 1e308}, "'rope_scaling.beta_fast' must be in the range of float32, got 1e+308"),
        (YARN | {"beta_slow": 1e-320}, "'rope_scaling.beta_slow' must be in the range of float32, got 1e-320"),
        (YARN | {"truncate": 1}, "'rope_scaling.truncate' must be true or false, got 1"),
        (YARN | {"attention_factor": 0}, "'rope_scaling.attention_factor' must be a number above 0, got 0"),
        (YARN | {"mscale": 3e38, "factor": 1e30, "mscale_all_dim": 1e-9}, "with .*'mscale': 3e+38.* float32"),
        (
            YARN | {"original_max_position_embeddings": 2**31},
            "'rope_scaling.original_.*' must be a whole number from 1 to 2147483647, got 2147",
        ),
        (LONGROPE | {"original_max_position_embeddings": 1}, "'rope_scaling.original_.*' must be above 1 .*, got 1"),
        (LONGROPE | {"original_max_position_embeddings": None}, "'rope_scaling.original_max_position.*' .* got None"),
        (LONGROPE | {"long_factor": [1.0] * 15}, "'rope_scaling.long_factor' must be a list of 16 .* got .1.0, 1"),
        (LONGROPE | {"long_factor": [1.0] * 15 + [0]}, "'rope_scaling.long_factor' must be a list of 16 .* 1.0, 0."),
        (LONGROPE | {"long_factor": [1e-39] * 16}, "'rope_scaling.long_factor' .* float32, got .1e-39"),
        (LONGROPE | {"long_factor": None}, "'rope_scaling.long_factor' .* got None"),
        ([1], r"'rope_scaling' must be an object, got \[1\]"),
        ("yarn", "'rope_scaling' must be an object, got 'yarn'"),
    ],
)  # fmt: skip
def test_bad_values(parameters: Any, said: str) -> None:
    with pytest.raises(CheckpointError, match=f"{WHERE}: .*{said.replace('+', '[+]')}"):
        read(parameters)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"original_max_position_embeddings": 1}, "'original_max_position_embeddings' must be above 1 .*, got 1"),
        (
            {"max_position_embeddings": None},
            "'max_position_embeddings' must be a whole number from 1 .*, got None",
        ),
    ],
)
def test_bad_values_beside_the_parameters(config: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=f"{WHERE}: {said}"):
        read(LONGROPE, **config)


@pytest.mark.parametrize(("share", "turned"), [(0.3, 9), (0.01, 0), (2, 64)])
def test_parts_that_cannot_turn(share: float, turned: int) -> None:
    with pytest.raises(
        UnsupportedModelError, match=rf"even head_dim, got {turned} of 32 \(partial_rotary_factor {share}\)"
    ):
        read(partial_rotary_factor=share)


def test_odd_values_end_in_an_error_or_in_angles() -> None:
    rng = np.random.default_rng(0)

    def pick(values: list[Any]) -> Any:
        return values[rng.integers(len(values))]

    odd: list[Any] = [
        0, 1, 2, -1, 0.5, 1.0, 1.0000000000000002, 1e-45, 1.2e-38, 1e-30, 1e30, 3e38, 1e300, float("inf"), float("nan"),
        True, None, "4", [], {}, 7.5, 4096, 2**31 - 1, 2**63, 10**400,
    ]  # fmt: skip
    keys = sorted({key for parameters in CASES.values() for key in parameters} - {"rope_type"} | {"rope_theta"})
    read_well = set()
    for _ in range(3000):
        parameters = pick(list(CASES.values())) | {pick(keys): pick(odd) for _ in range(rng.integers(4))}
        if rng.random() < 0.3 and isinstance(parameters.get("long_factor"), list):
            parameters["long_factor"] = [*parameters["long_factor"][:-1], pick(odd)]
        beside = {
            key: pick(odd)
            for key in ("max_position_embeddings", "original_max_position_embeddings", "rope_theta")
            if rng.random() < 0.1
        }
        try:
            rope = read(parameters, pick([None, 1, ORIGINAL]), **beside)
        except TrimKVError:
            continue
        read_well.add(rope.rope_type)
        values = np.array([*rope.inverse_frequencies, rope.attention_scaling], np.float32)
        assert np.isfinite(values).all(), parameters
        assert (values > 0).all(), parameters
    assert read_well == set(KINDS)
