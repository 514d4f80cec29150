"""Two packages of one model on the same tokens: what another precision, or another budget, changes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from trimkv_export.errors import OptionError
from trimkv_export.runtime import Engine

__all__ = ["Comparison", "compare_engines"]


@dataclass(frozen=True)
class Comparison:
    """How close a package's engine is to another's; both saw the same tokens at every step.

    Attributes:
        prompt_tokens: tokens that were fed in chunks.
        new_tokens: tokens that were fed one by one after those, as the other engine chose them, greedily.
        logit_difference: root mean square, as a share of the standard deviation of the other's logits.
        max_logit_difference: the largest, as a share of the other's largest logit.
        token_agreement: share of the steps at which both put the same token first.
        kept_overlap: share of the other's kept entries (layer, head, position) that this one kept too, at the end.
    """

    prompt_tokens: int
    new_tokens: int
    logit_difference: float
    max_logit_difference: float
    token_agreement: float
    kept_overlap: float

    def as_dict(self) -> dict[str, Any]:
        """For `verify --json`."""
        return asdict(self)


def compare_engines(engine: Engine, other: Engine, tokens: Sequence[int], new_tokens: int = 64) -> Comparison:
    """Feed both engines a prompt, and what `other` goes on with.

    Args:
        engine: the engine that is judged.
        other: the engine that it is compared with.
        tokens: the prompt.
        new_tokens: how many tokens follow.

    Raises:
        OptionError: the two are not of one model, or there are no tokens.
    """
    for name in ("model_type", "vocab_size", "num_layers", "num_kv_heads", "gate_kind"):
        found, wanted = getattr(engine.config.model, name), getattr(other.config.model, name)
        if found != wanted:
            raise OptionError(
                f"{engine.package.path} and {other.package.path} are of different models: {name} {found} and {wanted}"
            )
    if not tokens or new_tokens < 0:
        raise OptionError(f"there is nothing to compare in {len(tokens)} tokens and {new_tokens} more")
    chunk = min(engine.config.prefill_chunk, other.config.prefill_chunk)
    differences, worst, agreed = [], 0.0, 0
    with engine.session() as session, other.session() as reference:
        part, fed, steps = list(tokens[:chunk]), 0, 0
        while part:
            found, expected = session.step(part), reference.step(part)
            distance = found - expected
            differences.append(float(np.sqrt(np.mean(distance**2)) / max(expected.std(), 1e-12)))
            worst = float(np.maximum(worst, np.abs(distance).max() / max(np.abs(expected).max(), 1e-12)))
            agreed += int(found.argmax() == expected.argmax())
            fed, steps = fed + len(part), steps + 1
            left = len(tokens) + new_tokens - fed
            part = list(tokens[fed : fed + chunk]) if fed < len(tokens) else [int(expected.argmax())][:left]
        kept, wanted = ({tuple(row) for row in one.kept().tolist()} for one in (session, reference))
    return Comparison(
        prompt_tokens=len(tokens),
        new_tokens=new_tokens,
        logit_difference=float(np.mean(differences)),
        max_logit_difference=worst,
        token_agreement=agreed / steps,
        kept_overlap=len(kept & wanted) / len(wanted),
    )
