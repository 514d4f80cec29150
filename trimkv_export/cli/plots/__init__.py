"""The pictures, drawn with matplotlib: which file they go to, and labels in place of legends."""

import importlib
import logging
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from trimkv_export.errors import OutputError, missing
from trimkv_export.files import require_writable, writable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["label_lines", "load_plots", "save"]

# Least distance between labels, as a share of an axis's height.
LABEL_GAP = 0.06


def load_plots(name: str, option: str, picture: Path) -> Any:
    """Import a module of this folder, once it is certain that it can draw: to be called before the work.

    Args:
        name: of the module.
        option: what asked for the picture, for the message.
        picture: the file that will be written.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        OutputError: the file cannot be written, or is of a kind that matplotlib does not draw.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns where there is no HOME for its cache
    try:
        from matplotlib.backend_bases import FigureCanvasBase

        module = importlib.import_module(f"{__name__}.{name}")
    except ImportError:
        raise missing(option, "matplotlib", "plot") from None
    require_writable(picture)
    known = FigureCanvasBase.get_supported_filetypes()
    if _kind(picture) not in known:
        raise OutputError(
            f"{picture}: the picture cannot be written: {picture.suffix} is no kind of picture that matplotlib draws; "
            f"name a file that ends in one of {', '.join(f'.{kind}' for kind in known)}"
        )
    return module


def save(figure: "Figure", picture: Path) -> None:
    """Write a figure, as PNG or what the suffix says.

    Raises:
        OutputError: the file cannot be written.
    """
    with writable(picture, "the picture cannot be written") as file:
        try:
            figure.savefig(file, dpi=130, format=_kind(picture))
        except ValueError as error:
            raise OutputError(f"{picture}: the picture cannot be written: {error}") from None


def _kind(picture: Path) -> str:
    return picture.suffix.lower().removeprefix(".") or "png"


def label_lines(axis: "Axes", labels: Sequence[tuple[float, str, str]], x: float) -> None:
    """Write labels in a column, each as near to its height as the others allow.

    Args:
        axis: where; its limits are final.
        labels: height in data, text and colour of each.
        x: of the column, as a share of the axis's width.
    """
    # Data -> shares of the axis's height, whatever its scale.
    to_share = (axis.transData + axis.transAxes.inverted()).transform
    ordered = sorted(labels, key=lambda label: label[0])
    right = axis.get_xlim()[1]
    heights = [max(LABEL_GAP / 2, float(to_share((right, value))[1])) for value, _, _ in ordered]
    for height, (_, text, colour) in zip(_spread(heights, LABEL_GAP), ordered, strict=True):
        axis.annotate(text, (x, height), xycoords="axes fraction", color=colour, verticalalignment="center")


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights, moved so that neighbours are `gap` apart: what is too close is centred on where it was."""
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1:
            below, above = groups[-2:]
            if fmean(above) - fmean(below) >= gap * (len(above) + len(below)) / 2:
                break
            groups[-2:] = [below + above]
    return [fmean(group) + gap * (i - (len(group) - 1) / 2) for group in groups for i in range(len(group))]
