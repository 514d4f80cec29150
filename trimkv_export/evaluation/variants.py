"""A package under another policy, or with a larger budget: the same weights with another decoder.onnx."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from trimkv_export.config import EvictionConfig, Policy
from trimkv_export.errors import missing
from trimkv_export.evaluation.policies import RANDOM_LOOKAHEAD, EvaluatedPolicy, log_betas
from trimkv_export.package import DECODER, Package
from trimkv_export.package.variant import variant_folder

__all__ = ["load_editor", "open_variant", "variant_eviction"]


def load_editor() -> Callable[..., bytes]:
    """Return what writes the decoder of a variant; measuring speed alone does without the packages that it needs.

    Raises:
        MissingDependencyError: one of them is not installed.
    """
    try:
        from trimkv_export.graph.variant import decoder_with_eviction
    except ImportError as error:
        raise missing("evaluating", str(error.name), "export,runtime") from None
    return decoder_with_eviction


def variant_eviction(eviction: EvictionConfig, policy: EvaluatedPolicy, budget: int) -> EvictionConfig:
    """Return the eviction settings of a package under another policy.

    What a policy has no use for is left out: a minimum where each head keeps as much as the others, and the package's
    lookahead where its gates do not decide.

    Raises:
        OptionError: the budget is below the minimum per head.
    """
    if policy in (EvaluatedPolicy.GLOBAL, EvaluatedPolicy.PER_HEAD):
        minimum = eviction.min_tokens_per_head if policy is EvaluatedPolicy.GLOBAL else 0
        return replace(eviction, policy=Policy(policy), budget=budget, min_tokens_per_head=minimum)
    if policy is EvaluatedPolicy.FULL:
        return replace(eviction, budget=budget)
    lookahead = RANDOM_LOOKAHEAD if policy is EvaluatedPolicy.RANDOM else 1
    return EvictionConfig(Policy.PER_HEAD, budget, eviction.evict_every, lookahead_steps=lookahead)


@contextlib.contextmanager
def open_variant(
    package: Package, policy: EvaluatedPolicy, budget: int, positions: int, seed: int = 0
) -> Iterator[Path]:
    """Yield a folder with the package under another policy; it is removed afterwards.

    It lies next to the package, whose other files are hard links there; where that cannot be, it is a copy in the
    system's folder for temporary files. If the package is as asked, the folder is its own.

    Args:
        package: the package.
        policy: what decides which entries stay.
        budget: the largest budget that is asked for.
        positions: the most tokens of a session, for policies that go by position.
        seed: of the random policy.

    Raises:
        OptionError: as `variant_eviction`.
        OutputError: the folder cannot be written.
        MissingDependencyError: as `load_editor`.
    """
    eviction = variant_eviction(package.config.eviction, policy, budget)
    cache = package.config.cache
    table = log_betas(policy, cache.num_streams, positions, seed)
    if table is None and eviction == replace(package.config.eviction, budget=budget) and budget <= cache.budget:
        yield package.path
        return
    config = replace(package.config, eviction=eviction)
    by_axis = config.model.rope.axes is not None
    decoder = load_editor()(
        package.path / DECODER, config.cache, eviction, config.graph_metadata(), table, by_axis=by_axis
    )
    with variant_folder(package, config, {DECODER: decoder}, "eval", f"the policy {policy}") as folder:
        yield folder
