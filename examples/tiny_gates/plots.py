"""The picture of the training losses."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

__all__ = ["draw_losses"]

SMOOTHED = 20  # steps


def draw_losses(logs: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Draw one panel per run: its logged values against the step, each as a running mean.

    Args:
        logs: rows of "step" and values, by the run's name.
        path: the picture.
    """
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(3.2 * len(logs), 3), layout="constrained")
        panels = figure.subplots(1, len(logs), squeeze=False)[0]
        for panel, (name, log) in zip(panels, logs.items(), strict=True):
            for key in log[0]:
                if key == "step":
                    continue
                values = np.array([row[key] for row in log])
                known = ~np.isnan(values)
                window = np.ones(min(SMOOTHED, known.sum()))
                mean = np.convolve(values[known], window / window.sum(), mode="valid")
                panel.plot(np.flatnonzero(known)[len(window) - 1 :], mean, label=key)
            panel.set(title=name, xlabel="step", ylabel=f"loss, mean of {SMOOTHED} steps", ylim=(0, None))
            panel.legend()
        figure.savefig(path, dpi=120)
