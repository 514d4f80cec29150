"""Draw the picture that the demo shows to the model: a house on a lake, before mountains.

    python examples/demo_picture.py OUT.png [--width 640] [--height 480]

The same arguments give the same pixels.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["draw_picture"]

Colour = tuple[int, int, int]
Point = tuple[float, float]

FINER = 3  # drawn so many times larger and scaled down, for smooth edges
SKY_TOP, SKY_LOW = (74, 128, 196), (250, 214, 170)
SUN, CLOUD = (255, 244, 190), (250, 248, 246)
FAR, NEAR, SNOW = (120, 134, 166), (86, 104, 132), (240, 244, 250)
WATER, GLITTER = (70, 122, 160), (244, 226, 176)
MEADOW, TRUNK, LEAVES = (104, 150, 70), (92, 66, 46), (48, 102, 58)
WALL, ROOF, DOOR, PANE, CHIMNEY = (236, 222, 196), (178, 62, 48), (112, 72, 48), (120, 178, 214), (134, 72, 60)
HORIZON = 0.62  # of the height


class _Canvas:
    """A picture under work; points are shares of its width and height, from the upper left."""

    def __init__(self, width: int, height: int) -> None:
        self.size = width * FINER, height * FINER
        rows = np.linspace(0, 1 / HORIZON, self.size[1])[:, None].clip(0, 1)
        sky = (1 - rows) * np.array(SKY_TOP) + rows * np.array(SKY_LOW)
        pixels = np.broadcast_to(sky.round().astype(np.uint8)[:, None], (self.size[1], self.size[0], 3))
        self.image = Image.fromarray(np.ascontiguousarray(pixels))
        self.draw = ImageDraw.Draw(self.image)

    def _scaled(self, points: Sequence[Point]) -> list[Point]:
        return [(x * self.size[0], y * self.size[1]) for x, y in points]

    def polygon(self, colour: Colour, *points: Point) -> None:
        self.draw.polygon(self._scaled(points), fill=colour)

    def box(self, colour: Colour, left: float, top: float, right: float, bottom: float) -> None:
        self.draw.rectangle(self._scaled([(left, top), (right, bottom)]), fill=colour)

    def disc(self, colour: Colour, x: float, y: float, wide: float, high: float | None = None) -> None:
        """An ellipse; radii are shares of the width, so that equal ones make a circle."""
        across, down = wide * self.size[0], (wide if high is None else high) * self.size[0]
        (x, y), *_ = self._scaled([(x, y)])
        self.draw.ellipse([x - across, y - down, x + across, y + down], fill=colour)


def draw_picture(width: int = 640, height: int = 480) -> Image.Image:
    """The picture, RGB of width x height pixels."""
    canvas = _Canvas(width, height)
    canvas.disc(SUN, 0.80, 0.17, 0.062)
    for x, y, size in ((0.20, 0.14, 1.0), (0.52, 0.22, 0.7)):
        for shift, up, radius in (
            (-0.06, 0.0, 0.030),
            (-0.02, -0.025, 0.042),
            (0.03, -0.01, 0.038),
            (0.07, 0.005, 0.026),
        ):
            canvas.disc(CLOUD, x + shift * size, y + up * size, radius * size, 0.8 * radius * size)
    _mountains(canvas)
    _lake(canvas)
    canvas.polygon(MEADOW, (0, 0.70), (0.16, 0.665), (0.40, 0.69), (0.56, 0.76), (0.66, 0.88), (0.70, 1), (0, 1))
    _house(canvas)
    for x, foot, size in ((0.075, 0.78, 1.15), (0.45, 0.80, 0.9), (0.53, 0.90, 1.1)):
        _tree(canvas, x, foot, size)
    return canvas.image.resize((width, height), Image.Resampling.BOX)


def _mountains(canvas: _Canvas) -> None:
    for colour, peaks in (
        (FAR, ((0.12, 0.36, 0.24), (0.44, 0.27, 0.30), (0.95, 0.33, 0.28))),
        (NEAR, ((0.28, 0.40, 0.22), (0.70, 0.30, 0.26))),
    ):
        for x, top, wide in peaks:
            canvas.polygon(colour, (x - wide, HORIZON), (x, top), (x + wide, HORIZON))
            share = 0.28  # of the mountain is under snow; its edge is jagged
            low, side = top + share * (HORIZON - top), share * wide
            jags = [
                (x + side * at, low + (0.02 if number % 2 else -0.012))
                for number, at in enumerate((0.5, 0.1, -0.3, -0.6))
            ]
            canvas.polygon(SNOW, (x, top), (x + side, low), *jags, (x - side, low))


def _lake(canvas: _Canvas) -> None:
    canvas.box(WATER, 0, HORIZON, 1, 1)
    for number in range(12):  # the sun on the water
        y, wide = HORIZON + 0.012 + 0.03 * number, 0.015 + 0.006 * number
        shift = 0.014 * (-1) ** number
        canvas.box(GLITTER, 0.80 + shift - wide, y, 0.80 + shift + wide, y + 0.006)


def _house(canvas: _Canvas) -> None:
    canvas.box(CHIMNEY, 0.315, 0.50, 0.345, 0.60)
    canvas.box(WALL, 0.16, 0.64, 0.38, 0.84)
    canvas.polygon(ROOF, (0.135, 0.645), (0.27, 0.50), (0.405, 0.645))
    canvas.box(DOOR, 0.245, 0.72, 0.295, 0.84)
    for left in (0.18, 0.315):
        canvas.box(PANE, left, 0.69, left + 0.045, 0.75)
        canvas.box(WALL, left + 0.020, 0.69, left + 0.025, 0.75)


def _tree(canvas: _Canvas, x: float, foot: float, size: float) -> None:
    canvas.box(TRUNK, x - 0.008 * size, foot - 0.08 * size, x + 0.008 * size, foot)
    for top, low, wide in ((0.20, 0.05, 0.048), (0.25, 0.12, 0.038), (0.29, 0.19, 0.026)):
        canvas.polygon(
            LEAVES, (x - wide * size, foot - low * size), (x, foot - top * size), (x + wide * size, foot - low * size)
        )


def main() -> None:
    """Parse the command line and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.png")
    parser.add_argument("--width", type=int, default=640, help="in pixels; default 640")
    parser.add_argument("--height", type=int, default=480, help="in pixels; default 480")
    options = parser.parse_args()
    if min(options.width, options.height) < 1:
        parser.error(f"--width and --height must be at least 1, got {options.width} and {options.height}")
    draw_picture(options.width, options.height).save(options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
