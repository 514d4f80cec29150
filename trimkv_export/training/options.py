"""The options of a training run, checked."""

import math
from dataclasses import dataclass
from typing import Any

from trimkv_export.checks import require_whole
from trimkv_export.config import MAX_BUDGET
from trimkv_export.errors import OptionError
from trimkv_export.words import shorten

__all__ = ["KINDS", "PRECISIONS", "TrainingOptions"]

KINDS = ("rg10", "rg")
PRECISIONS = ("auto", "bf16", "fp32")
MAX_CONTEXT = 1 << 20
MAX_STEPS = 1 << 30
MAX_WIDTH = 1 << 16


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How gates are trained.

    Attributes:
        kind: "rg10" (DBTrimKV: one budget for all heads) or "rg" (TrimKV: a budget for each).
        budget: M of the capacity loss, below `context`.
        steps: updates of the gates.
        context: tokens of a row.
        width: of the gates' hidden layers.
        rows: rows of a step. They go through the model one at a time, so memory does not depend on them.
        positions: places of a row, drawn at random, whose predictions the losses compare; 0 is all of them.
        learning_rate: of AdamW at its highest: it rises over the first steps, then falls to 0.
        bias: what the gates' outputs begin at where there is no cheap start; log β is then near -exp(-bias).
        capacity_weight: of the capacity loss; the other two have weight 1.
        chat_share: the part of the rows that are chats, where there are texts too.
        start_rows: rows of a cheap start before the first step, in which gates learn how long tokens are attended to.
        seed: of the gates' first weights, of rows and of positions.
        precision: "bf16" has matrix products in bfloat16, "auto" too where the processor has such.
        recompute: keep no activations of a layer between the passes: less memory, a third more time.
    """

    kind: str
    budget: int
    steps: int
    context: int = 2048
    width: int = 128
    rows: int = 1
    positions: int = 256
    learning_rate: float = 1e-3
    bias: float = 8.0
    capacity_weight: float = 1.0
    chat_share: float = 0.5
    start_rows: int = 32
    seed: int = 0
    precision: str = "auto"
    recompute: bool = False

    def __post_init__(self) -> None:
        """Raises: OptionError: a value is of another type, or outside its limits."""
        _require_choice("kind", self.kind, KINDS)
        _require_choice("precision", self.precision, PRECISIONS)
        for name, low, high in (
            ("budget", 1, MAX_BUDGET),
            ("steps", 1, MAX_STEPS),
            ("context", 2, MAX_CONTEXT),
            ("width", 1, MAX_WIDTH),
            ("rows", 1, 1 << 16),
            ("positions", 0, MAX_CONTEXT),
            ("start_rows", 0, 1 << 16),
            ("seed", 0, (1 << 63) - 1),
        ):
            require_whole(name.replace("_", "-"), getattr(self, name), low, high)
        if self.budget >= self.context:
            raise OptionError(
                f"budget must be below the context ({self.context}), got {self.budget}: in a row that fits into the "
                "budget nothing has to leave, and gates learn nothing"
            )
        for name, least, most in (
            ("learning_rate", 0.0, 1.0),
            ("bias", -30.0, 30.0),
            ("capacity_weight", 0.0, 1e6),
            ("chat_share", 0.0, 1.0),
        ):
            _require_number(name.replace("_", "-"), getattr(self, name), least, most)
        if self.learning_rate == 0:
            raise OptionError("learning-rate must be above 0, got 0: gates would stay as they are")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warm_up = min(100, max(1, self.steps // 20))
        return self.learning_rate * min(1.0, (step + 1) / warm_up, 1.5 * (self.steps - step) / self.steps)


def _require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise OptionError(f"{name} must be one of {', '.join(choices)}, got {shorten(value)}")


def _require_number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise OptionError(f"{name} must be a number, got {shorten(value)}")
    if not low <= value <= high:
        raise OptionError(f"{name} must be from {low:g} to {high:g}, got {shorten(value)}")
