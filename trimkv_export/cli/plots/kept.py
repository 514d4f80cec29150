"""Draw the kept entries: which head remembers which part of the text, and which patches of a picture are remembered."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from trimkv_export.cli.plots import save
from trimkv_export.policy import CacheSpec
from trimkv_export.vision.reader import VisualPrompt

__all__ = ["draw_kept", "draw_pictures"]

MAX_BINS = 512
MAX_FRAMES = 12
COLUMNS = 3
PANEL = 20.0  # square inches of one picture
# How bright patches are drawn: one that no head keeps, and one that the fewest heads keep.
DARK, DIM = 0.12, 0.5
MARK = "#0aa5a5"


def draw_kept(
    kept: NDArray[np.int32], cache: CacheSpec, tokens: int, path: Path, marks: Sequence[tuple[int, int]] = ()
) -> None:
    """Write a heat map, heads (layer by layer) × positions, as PNG or what the suffix says.

    Colour is the share of a bin's positions that a head keeps.

    Args:
        kept: rows (layer, KV head, position), [entries, 3].
        cache: with the budget in use.
        tokens: positions from 0 to draw.
        path: the picture.
        marks: ranges of positions, from the first to after the last, that triangles above the map point at.

    Raises:
        OutputError: the file cannot be written.
    """
    bins = min(tokens, MAX_BINS)
    edges = np.linspace(0, tokens, bins + 1)
    stream = kept[:, 0] * cache.num_kv_heads + kept[:, 1]
    counts, _, _ = np.histogram2d(stream, kept[:, 2], bins=(np.arange(cache.num_streams + 1) - 0.5, edges))
    share = counts / np.maximum(np.diff(edges), 1)
    height = min(12.0, 2.5 + 0.16 * cache.num_streams)
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(11, height), layout="constrained")
        heat, bars = figure.subplots(1, 2, sharey=True, width_ratios=(6, 1))
        extent = (0, tokens, cache.num_streams - 0.5, -0.5)
        # A single survivor among many tokens must still be seen.
        scale = PowerNorm(gamma=0.35, vmin=0, vmax=1)
        image = heat.imshow(share, aspect="auto", extent=extent, cmap="magma", norm=scale, interpolation="nearest")
        figure.colorbar(image, ax=heat, label="share kept", pad=0.01)
        for layer in range(1, cache.num_layers):
            heat.axhline(layer * cache.num_kv_heads - 0.5, color="white", linewidth=0.4)
        middle = (np.arange(cache.num_layers) + 0.5) * cache.num_kv_heads - 0.5
        step = -(-cache.num_layers // 24)
        heat.set_yticks(middle[::step], [str(layer) for layer in range(0, cache.num_layers, step)])
        heat.set(xlabel="token position", ylabel="layer (one row for each KV head)")
        per_stream = counts.sum(axis=1)
        bars.barh(np.arange(cache.num_streams), per_stream, height=1.0, color="tab:orange")
        bars.axvline(cache.budget, color="black", linewidth=0.8, linestyle=":")
        bars.set(xlabel=f"entries (budget {cache.budget})")
        heat.set_title(
            f"{int(per_stream.sum()):,} entries kept of {tokens * cache.num_streams:,}: "
            f"{tokens:,} tokens, {cache.num_streams} heads",
            loc="left",
            pad=22 if marks else None,
        )
        if marks:
            places = [(start + end) / 2 for start, end in marks]
            above = heat.get_xaxis_transform()
            heat.plot(places, np.full(len(places), 1.02), "v", color=MARK, transform=above, clip_on=False)
            for place in places:
                heat.axvline(place, color=MARK, linewidth=0.5, alpha=0.5)
            heat.text(0, 1.05, "▼ the marked text", color=MARK, transform=heat.transAxes)
        save(figure, path)


def draw_pictures(kept: NDArray[np.int32], cache: CacheSpec, prompt: VisualPrompt, path: Path) -> None:
    """Write the pictures of a prompt that began at position 0, dark where no head keeps a patch any more.

    The others are the brighter the more heads keep them; full brightness is the patch that most heads keep. Of a video
    every temporal patch is a picture; at most MAX_FRAMES are drawn, evenly spaced.

    Args:
        kept: rows (layer, KV head, position), [entries, 3].
        cache: of the package.
        prompt: the prompt with its pictures.
        path: the picture that is written.

    Raises:
        OutputError: the file cannot be written.
    """
    counts = np.bincount(kept[:, 2], minlength=len(prompt.tokens))
    frames = [(number, time, start) for number, starts in enumerate(prompt.starts) for time, start in enumerate(starts)]
    frames = [frames[i] for i in np.unique(np.linspace(0, len(frames) - 1, MAX_FRAMES).round().astype(int))]
    heads = [_patches(counts, prompt, number, start) for number, _, start in frames]
    most = max(1, *(int(count.max()) for count in heads))
    columns = min(COLUMNS, len(frames))
    rows = -(-len(frames) // columns)
    wide = float(np.clip(np.mean([count.shape[1] / count.shape[0] for count in heads]), 0.5, 2)) ** 0.5
    panel = (PANEL / min(columns, 2)) ** 0.5
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(columns * panel * wide + 1, rows * (panel / wide + 0.4)), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).reshape(-1)
        for axis in axes:
            axis.axis("off")
        for axis, (number, time, _), count in zip(axes, frames, heads, strict=False):
            picture = prompt.pictures[number]
            pixels = picture.pixels[min(time * picture.config.temporal_patch_size, len(picture.pixels) - 1)]
            light = np.kron(_brightness(count / most), np.ones((picture.config.factor, picture.config.factor)))
            axis.imshow((pixels * light[..., None]).astype(np.uint8))
            name = f"picture {number + 1}" + (f", frame {time + 1}" if picture.grid[0] > 1 else "")
            axis.set_title(f"{name}: {np.count_nonzero(count)} of {count.size} patches kept")
        greys = np.repeat(_brightness(np.arange(most + 1) / most)[:, None], 3, axis=1)
        scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(-0.5, most + 0.5), ListedColormap(greys))
        label = f"heads that keep the patch, of {cache.num_streams}"
        figure.colorbar(scale, ax=list(axes), label=label, shrink=0.8, pad=0.02, ticks=MaxNLocator(8, integer=True))
        save(figure, path)


def _patches(counts: NDArray[np.intp], prompt: VisualPrompt, number: int, start: int) -> NDArray[np.intp]:
    """The part of `counts` (by position) of the picture, or temporal patch, that starts at `start`: [h/m, w/m]."""
    picture = prompt.pictures[number]
    height, width = (side // picture.config.merge_size for side in picture.grid[1:])
    return counts[start : start + height * width].reshape(height, width)


def _brightness(share: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of patches that are kept by `share` (0 to 1) of as many heads as keep the most kept one."""
    return np.where(share > 0, DIM + (1 - DIM) * share, DARK)
