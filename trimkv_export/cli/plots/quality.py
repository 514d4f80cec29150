"""Draw quality against budget: accuracy and perplexity, one line for each policy."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter, ScalarFormatter

from trimkv_export.evaluation import EvaluatedPolicy, Result

__all__ = ["draw_quality"]

COLOURS = {
    EvaluatedPolicy.GLOBAL: "#e07b39",
    EvaluatedPolicy.PER_HEAD: "#c9b458",
    EvaluatedPolicy.SINKS_RECENT: "#3b6fb6",
    EvaluatedPolicy.RECENT: "#6fa8dc",
    EvaluatedPolicy.RANDOM: "#9e9e9e",
    EvaluatedPolicy.FULL: "#444444",
}


def draw_quality(results: Sequence[Result], path: Path) -> None:
    """Write the picture, as PNG or whatever the suffix says: a panel for accuracy, one for perplexity, where measured.

    Raises OSError or ValueError when the file cannot be written.
    """
    first = results[0]
    panels = {}
    if first.questions:
        panels["accuracy"] = f"accuracy, {first.questions:,} questions"
    if first.tokens:
        panels["perplexity"] = f"perplexity, {first.tokens:,} tokens"
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6 * len(panels), 4.6), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (attribute, title) in zip(axes, panels.items(), strict=True):
            _draw(axis, results, attribute)
            axis.set_title(title, loc="left")
        if first.questions:
            axes[0].yaxis.set_major_formatter(PercentFormatter(1))
            axes[0].set_ylim(-0.02, 1.02)
        axes[0].legend(frameon=False)
        figure.suptitle(f"Quality against budget, contexts of {first.context:,.5g} tokens", fontweight="bold")
        figure.savefig(path, dpi=130)


def _draw(axis: Axes, results: Sequence[Result], attribute: str) -> None:
    budgets = sorted({result.budget for result in results if result.policy is not EvaluatedPolicy.FULL})
    for policy, colour in COLOURS.items():
        points = [(result.budget, getattr(result, attribute)) for result in results if result.policy is policy]
        if policy is EvaluatedPolicy.FULL:
            for _, value in points:
                axis.axhline(value, color=colour, linestyle="--", label="full cache")
        elif points:
            axis.plot(*zip(*sorted(points), strict=True), "o-", color=colour, label=str(policy))
    if budgets:
        axis.set_xscale("log", base=2)
        axis.set_xticks(budgets)
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("budget: entries per layer and KV head, on average")
    axis.grid(color="#e4e4e4")
    axis.set_axisbelow(True)
