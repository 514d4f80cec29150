"""Options are checked once, wherever they come from."""

from pathlib import Path
from typing import Any

import pytest

from trimkv_export.config import BuildOptions, EvictionConfig, Policy, Precision, WeightStorage
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
        ({"weights": "move"}, "weights must be one of copy, link, got 'move'"),
    ],
)
def test_bad_values(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        options(**changes)
