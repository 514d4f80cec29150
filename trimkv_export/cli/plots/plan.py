"""Draw a memory plan: its parts against the device's memory, and cache bytes against context length."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from trimkv_export.cli.plots import label_lines, save
from trimkv_export.plan import MemoryPlan
from trimkv_export.plan.planner import ModelPlan
from trimkv_export.words import amount

__all__ = ["draw_plan"]

GB = 10**9
CACHE_COLOUR = "#e07b39"
# Attribute, name and colour, from the bottom of the bar to its top.
PARTS = (
    ("reserve_bytes", "reserve", "#9e9e9e"),
    ("weight_bytes", "weights", "#3b6fb6"),
    ("vision_bytes", "vision tower", "#6fa8dc"),
    ("activation_bytes", "activations", "#7bb662"),
    ("io_bytes", "inputs, outputs", "#c9b458"),
    ("cache_bytes", "cache", CACHE_COLOUR),
)
LIMIT_COLOUR = "#b22222"
LEAST_CONTEXT = 128


def draw_plan(found: ModelPlan, path: Path) -> None:
    """Write the picture of a plan, as PNG or what the suffix says.

    Raises:
        OutputError: the file cannot be written.
    """
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12, 5.2), layout="constrained")
        bar, curves = figure.subplots(1, 2, width_ratios=(1, 1.6))
        where = found.profile.title if found.profile else "ONNX Runtime on a CPU"
        _draw_parts(bar, found.plan)
        _draw_contexts(curves, found)
        sequences = f"{found.plan.batch} sequence{'' if found.plan.batch == 1 else 's'}"
        figure.suptitle(
            f"{found.options.model}, {found.options.precision}, budget {found.plan.budget:,}, {sequences}: {where}",
            fontweight="bold",
        )
        save(figure, path)


def _draw_parts(axis: Axes, plan: MemoryPlan) -> None:
    bottom, labels = 0.0, []
    for attribute, name, colour in PARTS:
        nbytes = getattr(plan, attribute)
        if nbytes:
            axis.bar(0, nbytes / GB, 0.8, bottom=bottom, color=colour)
            labels.append((bottom + nbytes / GB / 2, f"{name}  {amount(nbytes)}", colour))
            bottom += nbytes / GB
    top = bottom
    if plan.device_bytes is not None:
        limit = plan.device_bytes / GB
        axis.plot([-0.5, 0.5], [limit, limit], color=LIMIT_COLOUR, linestyle="--")
        labels.append((limit, f"device memory  {amount(plan.device_bytes)}", LIMIT_COLOUR))
        top = max(top, limit)
    fits = {None: "", True: ": fits", False: ": does not fit"}[plan.fits]
    axis.set_title(f"total {amount(plan.total_bytes)}{fits}", loc="left")
    axis.set(xlim=(-0.6, 2.6), ylim=(0, top * 1.08), ylabel="GB")
    axis.set_xticks([])
    label_lines(axis, labels, x=0.37)


def _draw_contexts(axis: Axes, found: ModelPlan) -> None:
    plan, profile = found.plan, found.profile
    per_token = plan.batch * found.cache.full_cache_nbytes(1)
    fitting = plan.full_cache_max_context or 0
    # With room to the right of the point where it stops fitting, for what is written there.
    longest = max(plan.full_cache_context, 8 * fitting, 4 * plan.budget, 8 * LEAST_CONTEXT)
    contexts = np.geomspace(LEAST_CONTEXT, longest, 200)
    axis.loglog(contexts, contexts * per_token, color="#444444", linewidth=2)
    middle = contexts[len(contexts) // 2]
    words = f"full cache\n■ {amount(plan.full_cache_bytes)} at {plan.full_cache_context:,} tokens"
    _write(axis, words, (middle, middle * per_token), (10, -4), "#444444", verticalalignment="top")
    axis.axhline(plan.cache_bytes, color=CACHE_COLOUR, linewidth=2.5)
    # Below the line and at its right end: the full cache is above it there.
    _write(
        axis, f"budget {plan.budget:,}:\n{amount(plan.cache_bytes)} at any length", (longest, plan.cache_bytes),
        (0, -5), CACHE_COLOUR, horizontalalignment="right", verticalalignment="top",
    )  # fmt: skip
    if plan.device_bytes is not None and profile is not None:
        left = plan.device_bytes - (plan.total_bytes - plan.cache_bytes)
        if left > 0:
            axis.axhline(left, color=LIMIT_COLOUR, linestyle="--")
            words = f"left for a cache on {profile.name}: {amount(left)}"
            _write(axis, words, (LEAST_CONTEXT, left), (0, 5), LIMIT_COLOUR)
        if fitting >= LEAST_CONTEXT:
            axis.plot([fitting], [fitting * per_token], "o", color=LIMIT_COLOUR)
            words = f"a full cache stops fitting\nafter {fitting:,} tokens"
            _write(axis, words, (fitting, fitting * per_token), (-10, 20), LIMIT_COLOUR, horizontalalignment="right")
    if LEAST_CONTEXT <= plan.full_cache_context <= longest:
        axis.plot([plan.full_cache_context], [plan.full_cache_bytes], "s", color="#444444")
    axis.set_title("keys and values against context length", loc="left")
    axis.set(xlabel="context length, tokens", ylabel="bytes of all sequences")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tokens(value)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
    axis.margins(x=0.12)
    axis.grid(which="major", color="#e4e4e4")
    axis.set_axisbelow(True)


def _write(
    axis: Axes, words: str, place: tuple[float, float], offset: tuple[int, int], colour: str, **alignment: Any
) -> None:
    """Words at a place in data, moved by an offset in points."""
    axis.annotate(words, place, xytext=offset, textcoords="offset points", color=colour, **alignment)


def _tokens(count: float) -> str:
    for unit, size in (("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"
