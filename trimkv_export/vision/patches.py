"""Resized frames, and the patches of them that the vision tower reads."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trimkv_export.errors import OptionError
from trimkv_export.vision.positions import Grid, Interval
from trimkv_export.vision.processor_config import PatchConfig

__all__ = ["ResizedFrames"]


@dataclass(frozen=True, eq=False)
class ResizedFrames:
    """The frames of an image (one) or a video, resized but not cut: 3 bytes per pixel, where patches take 24.

    Attributes:
        pixels: [frames, height, width, 3] uint8.
        config: how pixels become patches.
        name: of the source, for messages.

    Raises:
        OptionError: the sides are not multiples of `config.factor`.
    """

    pixels: npt.NDArray[np.uint8]
    config: PatchConfig
    name: str

    def __post_init__(self) -> None:
        height, width = self.size
        if height % self.config.factor or width % self.config.factor:
            raise OptionError(
                f"{self.name} is {width} x {height} pixels; without resizing (do_resize is false) both sides must be "
                f"multiples of {self.config.factor}"
            )

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.pixels.shape[1], self.pixels.shape[2]

    @property
    def grid(self) -> Grid:
        """(t, h, w) in patches; t = frames / temporal_patch_size, rounded up."""
        height, width = self.size
        group, side = self.config.temporal_patch_size, self.config.patch_size
        return -(-len(self.pixels) // group), height // side, width // side

    @property
    def tokens(self) -> int:
        """How many visual tokens its patches are merged into."""
        return math.prod(self.grid) // self.config.merge_size**2

    @property
    def second_per_grid(self) -> Interval:
        """Seconds from one temporal patch to the next."""
        return 1.0

    @property
    def pixel_values(self) -> npt.NDArray[np.float32]:
        """All patches, [t*h*w, patch_dim]."""
        return self.patches(0, self.grid[0])

    def patches(self, first: int, end: int) -> npt.NDArray[np.float32]:
        """Patches [(end - first)*h*w, 3*T*p*p] of temporal patches first … end - 1, normalised.

        Rows are ordered (t, h/m, w/m, m, m) with merge size m, so that the patches of one token follow each other;
        columns are (channel, frame of T, row, column) with patch size p. The last frame is repeated to fill its patch.
        """
        _, h, w = self.grid
        p, m, group = self.config.patch_size, self.config.merge_size, self.config.temporal_patch_size
        table = _table(self.config)
        blocks = np.empty((end - first, h // m, w // m, m, m, 3, group, p, p), np.float32)
        for place in range((end - first) * group):
            frame = min(first * group + place, len(self.pixels) - 1)
            # [h/m, w/m, m, m, 3, p, p], a view
            cut = self.pixels[frame].reshape(h // m, m, p, w // m, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
            t, k = divmod(place, group)
            for channel in range(3):
                blocks[t, ..., channel, k, :, :] = table[channel][cut[..., channel, :, :]]
        return blocks.reshape((end - first) * h * w, -1)


def _table(config: PatchConfig) -> npt.NDArray[np.float32]:
    """[3, 256] float32: what each value of each channel becomes, rounded where the Pillow-backed reference rounds."""
    levels = np.arange(256)
    scaled = levels.astype(np.float32)
    if config.do_rescale:
        scaled = (levels.astype(np.float64) * config.rescale_factor).astype(np.float32)
    if not config.do_normalize:
        return np.stack([scaled] * 3)
    mean = np.array(config.image_mean, np.float32)[:, None]
    deviation = np.array(config.image_std, np.float32)[:, None]
    return np.asarray((scaled - mean) / deviation, np.float32)
