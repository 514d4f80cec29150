"""Draw quality against budget: accuracy and perplexity, one line for each policy."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter, ScalarFormatter

from trimkv_export.cli.plots import label_lines, save
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
    """Write the picture, as PNG or what the suffix says: a panel for accuracy, one for perplexity, where measured.

    Raises:
        OutputError: the file cannot be written.
    """
    first = results[0]
    panels = {}
    if first.question_context is not None:
        about = f"{first.questions:,} questions, contexts of {first.question_context:,.0f} tokens"
        panels["accuracy"] = f"accuracy, {about}\n(shaded: 95% interval)"
    if first.text_context is not None:
        panels["perplexity"] = f"perplexity, {first.tokens:,} tokens,\ntexts of {first.text_context:,.0f} tokens"
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6.6 * len(panels), 4.8), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (attribute, title) in zip(axes, panels.items(), strict=True):
            _draw(axis, results, attribute)
            axis.set_title(title, loc="left")
        figure.suptitle("Quality against budget", fontweight="bold")
        save(figure, path)


def _draw(axis: Axes, results: Sequence[Result], attribute: str) -> None:
    budgets = sorted({result.budget for result in results if result.policy is not EvaluatedPolicy.FULL})
    labels = []
    for policy, colour in COLOURS.items():
        points = sorted(
            (result.budget, getattr(result, attribute), result.accuracy_interval)
            for result in results
            if result.policy is policy
        )
        if not points:
            continue
        x, y, intervals = zip(*points, strict=True)
        if policy is EvaluatedPolicy.FULL:
            axis.axhline(y[-1], color=colour, linestyle="--")
        else:
            axis.plot(x, y, "o-", color=colour)
            if attribute == "accuracy":
                low, high = zip(*intervals, strict=True)
                axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        labels.append((y[-1], "full cache" if policy is EvaluatedPolicy.FULL else str(policy), colour))
    if budgets:
        axis.set_xscale("log", base=2)
        axis.set_xticks(budgets)
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_locator(NullLocator())
    if attribute == "accuracy":
        axis.yaxis.set_major_formatter(PercentFormatter(1))
        axis.set_ylim(-0.02, 1.02)
    axis.set(xlabel="budget: entries per layer and KV head, on average", ylabel=attribute)
    axis.grid(color="#e4e4e4")
    axis.set_axisbelow(True)
    axis.set_ylim(axis.get_ylim())  # final, so that the labels stay where they belong
    label_lines(axis, labels, x=1.02)
