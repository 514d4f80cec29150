"""Options are checked once, wherever they come from."""

import re
from pathlib import Path
from typing import Any

import pytest

from trimkv_export.config import (
    GROUPS,
    BuildOptions,
    EvictionConfig,
    PlanOptions,
    Policy,
    Precision,
    Recipe,
    WeightStorage,
    options_of,
)
from trimkv_export.errors import OptionError


def options(**changes: Any) -> BuildOptions:
    values: dict[str, Any] = {"model": "m", "output": Path("out"), "budget": 8}
    return BuildOptions(**values | changes)


def test_plain_strings_become_their_enums() -> None:
    values: dict[str, Any] = {"precision": "bf16", "weights": "link", "policy": "per_head"}
    found = options(**values)
    assert found.precision is Precision.BF16
    assert found.weights is WeightStorage.LINK
    assert found.eviction(Policy.GLOBAL).policy is Policy.PER_HEAD
    policy: Any = "global"
    assert EvictionConfig(policy, 1).policy is Policy.GLOBAL


def test_the_policy_of_the_gates_is_taken_unless_one_is_named() -> None:
    assert options().eviction(Policy.PER_HEAD).policy is Policy.PER_HEAD
    assert options(policy=Policy.GLOBAL).eviction(Policy.PER_HEAD).policy is Policy.GLOBAL


def test_the_table() -> None:
    rows = {option.name: option for option in options_of(BuildOptions)}
    assert all(option.group in GROUPS for option in rows.values())
    assert all(re.fullmatch(r"[A-Z][a-z]+ .*\.", option.help) for option in rows.values())
    # Each option is stated once: those of a plan are those of a build.
    for kind in (PlanOptions, Recipe):
        assert all(option == rows[option.name] for option in options_of(kind))
    for option in options_of(EvictionConfig):
        assert (option.low, option.high, option.help) == (rows[option.name].low, rows[option.name].high, option.help)
        assert option.default == rows[option.name].default
    assert (rows["prefill_chunk"].default, rows["evict_every"].default) == (256, 32)


def test_the_plan_of_a_build_has_its_values() -> None:
    made = options(precision="int4", max_batch=2, device="l4", min_tokens_per_head=1, policy="global")
    plan = made.plan_options()
    assert type(plan) is PlanOptions
    assert (plan.precision, plan.max_batch, plan.device, plan.policy) == ("int4", 2, "l4", "global")
    assert made.eviction(Policy.PER_HEAD) == EvictionConfig(Policy.GLOBAL, 8, min_tokens_per_head=1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": 0}, "budget must be a whole number from 1 to 1048576, got 0"),
        ({"budget": 8.0}, "got 8.0"),
        ({"budget": True}, "got True"),
        ({"budget": 1 << 21}, "got 2097152"),
        ({"evict_every": 0}, "evict-every must be a whole number from 1 to 65536, got 0"),
        ({"prefill_chunk": 0}, "prefill-chunk must be a whole number from 1 to 65536, got 0"),
        ({"lookahead_steps": "2"}, "lookahead-steps must be .* got '2'"),
        ({"min_tokens_per_head": -1}, "min-tokens-per-head must be a whole number from 0"),
        ({"min_tokens_per_head": 9}, "must not exceed the budget: got 9 with a budget of 8"),
        ({"min_tokens_per_head": 1, "policy": "per_head"}, "applies to the global policy only"),
        ({"policy": "threshold"}, "its memory has no bound"),
        ({"policy": "best"}, "policy must be one of global, per_head, got 'best'"),
        ({"precision": "int2"}, "precision must be one of fp32, fp16, bf16, int4, int8, got 'int2'"),
        ({"activations": "fp16"}, "activations fp16 go with precision int4 or int8; fp32 is that of everything"),
        ({"precision": "int4", "activations": "int8"}, "activations must be one of fp32, fp16, bf16, got 'int8'"),
        ({"block_size": 48}, "block-size must be one of 32, 64, 128, got 48"),
        ({"symmetric": 1}, "symmetric must be true or false, got 1"),
        ({"head": "int2"}, "head must be one of int8, int4, float, got 'int2'"),
        ({"model": " "}, "model must be a text, got ' '"),
        ({"output": 4}, "output must be a path, got 4"),
        ({"weights": "move"}, "weights must be one of copy, link, got 'move'"),
    ],
)
def test_bad_values(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        options(**changes)
