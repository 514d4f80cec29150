"""The picture of the demo: always the same, and full of different patches."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from support import ROOT, load_example

SCRIPT = ROOT / "examples" / "demo_picture.py"
draw_picture = load_example("demo_picture").draw_picture


def pixels(*size: int) -> NDArray[Any]:
    return np.asarray(draw_picture(*size))


def test_it_is_always_the_same() -> None:
    assert pixels().shape == (480, 640, 3)
    np.testing.assert_array_equal(pixels(), pixels())


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        pytest.param((0.80, 0.17), lambda red, green, _: red > 240 and green > 230, id="sun"),
        pytest.param((0.27, 0.58), lambda red, green, _: red > 2 * green, id="roof"),
        pytest.param((0.95, 0.80), lambda red, _, blue: blue > 2 * red, id="lake"),
        pytest.param((0.10, 0.95), lambda red, green, blue: green > 1.3 * red > 1.3 * blue, id="meadow"),
        pytest.param((0.44, 0.30), lambda *colour: min(colour) > 230, id="snow"),
    ],
)
def test_its_parts_are_where_they_belong(place: tuple[float, float], expected: Callable[..., bool]) -> None:
    colour = pixels()[int(place[1] * 480), int(place[0] * 640)].tolist()
    assert expected(*colour), colour


def test_its_parts_keep_their_places_at_another_size() -> None:
    small = np.asarray(draw_picture().resize((320, 240), Image.Resampling.BOX)).astype(int)
    assert np.abs(small - pixels(320, 240)).mean() < 3


def test_command_line(tmp_path: Path) -> None:
    out = tmp_path / "picture.png"
    command = [sys.executable, str(SCRIPT), str(out)]
    done = subprocess.run([*command, "--width=64", "--height=48"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with Image.open(out) as image:
        np.testing.assert_array_equal(np.asarray(image), pixels(64, 48))
    failed = subprocess.run([*command, "--width=0"], capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert "at least 1, got 0 and 480" in failed.stderr


@pytest.mark.parametrize("size", [(1, 1), (640, 10)])
def test_odd_sizes(size: tuple[int, int]) -> None:
    assert draw_picture(*size).size == size
