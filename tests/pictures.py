"""Pictures for tests, made here and never stored: noise, gradients and hard edges."""

from typing import Any

import numpy as np
import numpy.typing as npt

KINDS = ("noise", "gradient", "edges")


def picture(height: int, width: int, kind: str = "noise", seed: int = 0) -> npt.NDArray[np.uint8]:
    """[height, width, 3] uint8."""
    rng = np.random.default_rng([seed, height, width])
    pixels: Any
    if kind == "noise":
        pixels = rng.integers(0, 256, (height, width, 3))
    elif kind == "edges":
        pixels = rng.integers(0, 2, (height, width, 3)) * 255
    else:
        rows, columns = np.linspace(0, 255, height)[:, None], np.linspace(255, 0, width)
        pixels = np.stack(np.broadcast_arrays(rows, columns, (rows + columns) / 2), -1)
    return np.asarray(pixels, np.uint8)
