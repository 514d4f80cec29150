"""Labels in place of legends: where they stand, and what they say."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from support import Cli

from trimkv_export.cli.plots import LABEL_GAP, label_lines
from trimkv_export.cli.plots.kept import draw_kept
from trimkv_export.cli.plots.quality import draw_quality
from trimkv_export.evaluation import EvaluatedPolicy, Result
from trimkv_export.policy import CacheSpec


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """What was drawn."""
    found: list[Figure] = []
    savefig = Figure.savefig

    def save(self: Figure, *given: Any, **more: Any) -> None:
        found.append(self)
        savefig(self, *given, **more)

    monkeypatch.setattr(Figure, "savefig", save)
    return found


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_labels_stand_apart_and_near_their_lines(scale: str) -> None:
    axis = Figure().subplots()
    axis.set(ylim=(1, 1001), yscale=scale)
    label_lines(axis, [(900, "b", "red"), (100, "a", "blue"), (901, "c", "black")], x=1.0)
    heights = {text.get_text(): float(text.xy[1]) for text in axis.texts}  # type: ignore[attr-defined]
    share = [99 / 1000, 899 / 1000] if scale == "linear" else np.log([100, 900]) / np.log(1001)
    assert heights["c"] - heights["b"] == pytest.approx(LABEL_GAP)
    assert (heights["b"] + heights["c"]) / 2 == pytest.approx(share[1], abs=0.001)
    assert heights["a"] == pytest.approx(share[0])


def result(policy: EvaluatedPolicy, budget: int, right: int) -> Result:
    return Result(policy, budget, right / 40, right, 40, 100.0, 9.0 - right / 40, 50, 128.0, [])


def test_quality_has_a_label_for_each_policy_and_no_legend(figures: list[Figure], tmp_path: Path) -> None:
    results = [result(EvaluatedPolicy.GLOBAL, budget, budget // 2) for budget in (16, 32, 64)]
    results += [result(EvaluatedPolicy.RECENT, 16, 1), result(EvaluatedPolicy.FULL, 128, 40)]
    draw_quality(results, tmp_path / "quality.png")
    for axis, name in zip(figures[0].axes, ("accuracy", "perplexity"), strict=True):
        assert axis.get_legend() is None
        assert [text.get_text() for text in axis.texts] in (
            ["recent", "global", "full cache"],
            ["full cache", "global", "recent"],
        )
        assert axis.get_ylabel() == name
        assert len(axis.collections) == (2 if name == "accuracy" else 0)  # an interval for each line


def test_marks_point_at_their_positions(figures: list[Figure], tmp_path: Path) -> None:
    cache = CacheSpec(num_layers=3, num_kv_heads=2, head_dim=8, budget=8, evict_every=4)
    kept = np.array([[0, 0, 3], [1, 1, 90]], np.int32)
    draw_kept(kept, cache, 100, tmp_path / "kept.png", [(10, 14), (80, 81)])
    heat = figures[0].axes[0]
    marks = next(line for line in heat.lines if line.get_marker() == "v")
    assert np.asarray(marks.get_xdata()).tolist() == [12.0, 80.5]
    assert "the marked text" in heat.texts[0].get_text()
    draw_kept(kept, cache, 100, tmp_path / "kept.png")
    assert not figures[1].axes[0].texts


def test_a_picture_without_a_suffix_is_a_png_of_that_name(cli: Cli, package: Path, tmp_path: Path) -> None:
    done = cli("inspect", package, "--kept", tmp_path / "kept", "--prompt", "text")
    assert done.code == 0
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_bytes().startswith(b"\x89PNG")


def test_no_label_of_a_plan_crosses_the_limit(cli: Cli, figures: list[Figure], tmp_path: Path) -> None:
    """The line of the device's memory, and the labels of the bar's parts."""
    arguments = ("--model", "qwen3-4b", "--budget", 256, "--precision", "fp16", "--device", "l4")
    assert cli("plan", *arguments, "--plot", tmp_path / "plan.png").code == 0
    bar, curves = figures[0].axes
    assert (bar.get_legend(), curves.get_legend()) == (None, None)
    boxes = [text.get_window_extent() for text in bar.texts]
    assert len(boxes) >= 5
    for line in bar.lines:
        assert not any(line.get_window_extent().overlaps(box) for box in boxes)
    assert all(not a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert mpl.rcParams["axes.spines.top"]  # what was set for the picture is not left behind
