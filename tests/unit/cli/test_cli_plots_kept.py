"""What `inspect --kept` draws over pictures, and for which budget."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from support import IMAGE, VISION_END, VISION_START, Cli

from trimkv_export.cli.plots import kept as kept_plot
from trimkv_export.cli.plots.kept import DARK, DIM, draw_pictures
from trimkv_export.policy import CacheSpec
from trimkv_export.runtime import Engine
from trimkv_export.vision.reader import VisualPrompt

WHITE = np.full((64, 96, 3), 255, np.uint8)  # 2 x 3 tokens


@pytest.fixture
def prompt(visual_package: Path) -> Iterator[VisualPrompt]:
    """Two white images of 2 x 3 tokens each, with text before."""
    with Engine.open(visual_package) as engine:
        place = [VISION_START, IMAGE, VISION_END]
        yield engine.pictures.read([1, 2, *place, *place], [WHITE, WHITE])


@dataclass
class Drawn:
    """What went to matplotlib."""

    pictures: list[NDArray[Any]]
    titles: list[str]
    bar: Any = None
    label: str = ""

    def light(self, number: int) -> NDArray[Any]:
        """Brightness of each patch of a white picture, [2, 3]; each is lit evenly."""
        blocks = self.pictures[number].reshape(2, 32, 3, 32, 3)
        assert (blocks == blocks[:, :1, :, :1, :1]).all()
        return np.asarray(blocks[:, 0, :, 0, 0] / 255)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    found = Drawn([], [])
    imshow, title, bar = Axes.imshow, Axes.set_title, Figure.colorbar

    def show(self: Axes, values: NDArray[Any], *given: Any, **more: Any) -> Any:
        found.pictures.append(values)
        return imshow(self, values, *given, **more)

    def name(self: Axes, text: str, *given: Any, **more: Any) -> Any:
        found.titles.append(text)
        return title(self, text, *given, **more)

    def colorbar(self: Figure, scale: Any, **more: Any) -> Any:
        found.bar, found.label = scale, more["label"]
        return bar(self, scale, **more)

    monkeypatch.setattr(Axes, "imshow", show)
    monkeypatch.setattr(Axes, "set_title", name)
    monkeypatch.setattr(Figure, "colorbar", colorbar)
    return found


def kept(cache: CacheSpec, heads: dict[int, int]) -> NDArray[np.int32]:
    """Rows for position -> number of heads that keep it."""
    rows = [
        (stream // cache.num_kv_heads, stream % cache.num_kv_heads, position)
        for position, count in heads.items()
        for stream in range(count)
    ]
    return np.array(sorted(rows), np.int32).reshape(-1, 3)


def test_the_patch_that_most_heads_keep_is_as_bright_as_the_picture(
    prompt: VisualPrompt, drawn: Drawn, tmp_path: Path
) -> None:
    cache = CacheSpec(num_layers=3, num_kv_heads=2, head_dim=8, budget=8, evict_every=4)
    (first,), (second,) = prompt.starts
    draw_pictures(kept(cache, {0: 6, first + 1: 1, second: 2, second + 5: 1}), cache, prompt, tmp_path / "out.png")
    half = (1 + DIM) / 2
    expected = [[[DARK, half, DARK], [DARK, DARK, DARK]], [[1, DARK, DARK], [DARK, DARK, half]]]
    np.testing.assert_allclose([drawn.light(0), drawn.light(1)], expected, atol=1 / 255)
    assert drawn.titles == ["picture 1: 1 of 6 patches kept", "picture 2: 2 of 6 patches kept"]
    assert drawn.label.endswith("of 6")


def test_the_colour_bar_tells_the_brightness_of_a_patch(prompt: VisualPrompt, drawn: Drawn, tmp_path: Path) -> None:
    cache = CacheSpec(num_layers=3, num_kv_heads=2, head_dim=8, budget=8, evict_every=4)
    (first,), _ = prompt.starts
    counts = {first + token: token for token in range(6)}
    draw_pictures(kept(cache, counts), cache, prompt, tmp_path / "out.png")
    told = drawn.bar.to_rgba(np.arange(6))[:, 0]
    np.testing.assert_allclose(drawn.light(0).ravel(), told, atol=1 / 255)
    assert (np.diff(told) > 0).all()


def test_pictures_of_which_nothing_is_kept(prompt: VisualPrompt, drawn: Drawn, tmp_path: Path) -> None:
    cache = CacheSpec(num_layers=3, num_kv_heads=2, head_dim=8, budget=8, evict_every=4)
    draw_pictures(kept(cache, {0: 6}), cache, prompt, tmp_path / "out.png")
    np.testing.assert_allclose([drawn.light(0), drawn.light(1)], DARK, atol=1 / 255)


def test_a_picture_that_is_long_or_high_fits(visual_package: Path, tmp_path: Path) -> None:
    for size in ((32, 32 * 30, 3), (32 * 30, 32, 3)):
        with Engine.open(visual_package) as engine:
            prompt = engine.pictures.read([IMAGE], [np.zeros(size, np.uint8)])
            draw_pictures(np.zeros((0, 3), np.int32), engine.config.cache, prompt, tmp_path / "out.png")
        with Image.open(tmp_path / "out.png") as image:
            assert max(image.size) < 2000


@pytest.mark.parametrize(("more", "budget"), [([], 8), (["--budget", 3], 3)])
def test_the_heat_map_shows_the_budget_in_use(
    cli: Cli, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[Any], budget: int
) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(kept_plot, "draw_kept", lambda _, cache, *__: drawn.append(cache.budget))
    assert cli("inspect", package, "--kept", tmp_path / "kept.png", "--prompt", "text", *more).code == 0
    assert drawn == [budget]
