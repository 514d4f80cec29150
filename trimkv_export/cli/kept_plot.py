"""Draw the kept entries: which head remembers which part of the text, and which patches of a picture are remembered."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from trimkv_export.policy import CacheSpec
from trimkv_export.runtime.pictures import VisualPrompt

__all__ = ["draw_kept", "draw_pictures"]

MAX_BINS = 512
MAX_FRAMES = 12
COLUMNS = 3


def draw_kept(kept: NDArray[np.int32], cache: CacheSpec, tokens: int, path: Path) -> None:
    """Write a heat map, heads (layer by layer) × positions, as PNG or whatever the suffix says.

    kept: rows (layer, KV head, position), [entries, 3]. Colour is the share of a bin's positions that a head keeps.

    Raises OSError or ValueError when the file cannot be written.
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
        )
        figure.savefig(path, dpi=130)


def draw_pictures(kept: NDArray[np.int32], cache: CacheSpec, prompt: VisualPrompt, path: Path) -> None:
    """Write the pictures of a prompt that began at position 0, dark where no head keeps a patch any more.

    Of a video every temporal patch is a picture; at most MAX_FRAMES are drawn, evenly spaced.

    Raises OSError or ValueError when the file cannot be written.
    """
    counts = np.bincount(kept[:, 2], minlength=len(prompt.tokens)) / cache.num_streams
    frames = [(number, time, start) for number, starts in enumerate(prompt.starts) for time, start in enumerate(starts)]
    shown = [frames[i] for i in np.unique(np.linspace(0, len(frames) - 1, MAX_FRAMES).round().astype(int))]
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    scale = PowerNorm(gamma=0.35, vmin=0, vmax=1)
    figure = Figure(figsize=(4.5 * columns + 1, 4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for axis in axes:
        axis.axis("off")
    for axis, (number, time, start) in zip(axes, shown, strict=False):
        picture = prompt.pictures[number]
        _, height, width = picture.grid
        merge = picture.config.merge_size
        shape = height // merge, width // merge
        share = counts[start : start + shape[0] * shape[1]].reshape(shape)
        pixels = picture.pixels[min(time * picture.config.temporal_patch_size, len(picture.pixels) - 1)]
        light = 0.12 + 0.88 * np.asarray(scale(share))
        lit = np.kron(light, np.ones((picture.config.factor, picture.config.factor)))[..., None]
        axis.imshow((pixels * lit).astype(np.uint8))
        name = f"picture {number + 1}" + (f", frame {time + 1}" if picture.grid[0] > 1 else "")
        axis.set_title(f"{name}: {np.count_nonzero(share)} of {share.size} tokens kept by some head", fontsize=8)
    colours = mpl.cm.ScalarMappable(norm=scale, cmap="gray")
    figure.colorbar(colours, ax=list(axes), label="share of heads that keep the token", shrink=0.7)
    figure.savefig(path, dpi=130)
