"""replay_case hands each image over once, whole, with the step of its first token. The engine here only listens."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from support import GOLDEN_VISUAL

from trimkv_export.errors import OptionError
from trimkv_export.runtime import Engine
from trimkv_export.verify import replay_case

IMAGE, VIDEO, VISION_START = 147, 148, 149
# Recorded by the official script alone, which has one image, in the first step, and does not say where.
ONE_STEP = [case for case in GOLDEN_VISUAL if case.name.startswith(("qwen2_5_vl", "llava"))]
CUT = next(path for path in GOLDEN_VISUAL if path.name == "rg10_cut_two_images")


class Listener:
    """Stands for an engine and its session; answers what was recorded."""

    def __init__(self, case: Path) -> None:
        about = json.loads((case / "case.json").read_text())
        with np.load(case / "trace.npz") as archive:
            self.trace = dict(archive)
        self.config = SimpleNamespace(
            model=SimpleNamespace(num_layers=about["layers"], num_kv_heads=about["kv_heads"], gate_kind=about["gate"]),
            eviction=SimpleNamespace(
                budget=about["budget"],
                evict_every=about["buffer"],
                min_tokens_per_head=about["min_per_head"],
                lookahead_steps=about["lookahead"],
            ),
            prefill_chunk=max(about["chunks"]),
        )
        self.steps: list[tuple[list[int], NDArray[Any] | None, NDArray[Any] | None]] = []

    def session(self) -> "Listener":
        return self

    def __enter__(self) -> "Listener":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def step(
        self,
        tokens: Sequence[int],
        pixel_values: NDArray[Any] | None = None,
        image_grid_thw: NDArray[Any] | None = None,
    ) -> NDArray[Any]:
        self.steps.append((list(tokens), pixel_values, image_grid_thw))
        logits: NDArray[Any] = self.trace[f"step_{len(self.steps) - 1}_logits"][-1]
        return logits

    def kept(self) -> NDArray[Any]:
        kept: NDArray[Any] = self.trace[f"step_{len(self.steps) - 1}_kept"]
        return kept


@pytest.mark.parametrize("case", [case for case in GOLDEN_VISUAL if case not in ONE_STEP], ids=lambda path: path.name)
def test_each_image_once_with_its_first_token(case: Path) -> None:
    listener = Listener(case)
    assert replay_case(cast(Engine, listener), case).passed
    trace = listener.trace
    tokens = [token for step, _, _ in listener.steps for token in step]
    assert tokens == [*trace["input_ids"][0], *trace["decoded"]]
    assert [len(step) for step, _, _ in listener.steps] == trace["chunks"].tolist()

    pixels = [values for _, values, _ in listener.steps if values is not None]
    if "text_only" in case.name:
        assert not pixels
        return
    np.testing.assert_array_equal(np.concatenate(pixels), trace["pixel_values"])
    fed = begun = 0
    for step, values, grids in listener.steps:
        starts = [] if grids is None else trace["image_starts"][begun : begun + len(grids)].tolist()
        assert all(fed <= start < fed + len(step) for start in starts)
        assert (grids is None) == (values is None)
        if grids is not None and values is not None:
            assert grids.prod(axis=1).sum() == len(values)
        fed, begun = fed + len(step), begun + len(starts)
    assert begun == len(trace["image_grid_thw"])
    # The record itself: a quarter as many placeholders as patches, the first one after a start token.
    assert sum(token in (IMAGE, VIDEO) for token in tokens) * 4 == len(trace["pixel_values"])
    assert all(tokens[start - 1] == VISION_START for start in trace["image_starts"])


@pytest.mark.parametrize("case", ONE_STEP, ids=lambda path: path.name)
def test_an_image_of_the_first_step(case: Path) -> None:
    """Images of one size are recorded as pixels, and cut into the tower's patches."""
    listener = Listener(case)
    listener.config.vision = SimpleNamespace(patch_size=4)
    assert replay_case(cast(Engine, listener), case).passed
    (_, values, grids), *others = listener.steps
    assert all(patches is None and grid is None for _, patches, grid in others)
    recorded = listener.trace["pixel_values"]
    assert values is not None
    assert grids is not None
    if "image_grid_thw" in listener.trace:
        np.testing.assert_array_equal(values, recorded)
        return
    assert grids.tolist() == [[1, 5, 5]]
    for patch, row, column in ((0, 0, 0), (1, 0, 1), (5, 1, 0), (24, 4, 4)):
        wanted = recorded[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        np.testing.assert_array_equal(values[patch], wanted.ravel())


def test_pixels_for_another_tower() -> None:
    case = next(case for case in ONE_STEP if "llava" in case.name)
    listener = Listener(case)
    for vision, said in ((None, "has no vision tower"), (SimpleNamespace(patch_size=14), "in patches of 14")):
        listener.config.vision = vision
        with pytest.raises(OptionError, match=f"has images of 20 x 20 pixels, and the package .*{said}"):
            replay_case(cast(Engine, listener), case)


def test_images_of_a_cut_step() -> None:
    listener = Listener(CUT)
    replay_case(cast(Engine, listener), CUT)
    given = [(len(step), None if grids is None else grids.tolist()) for step, _, grids in listener.steps]
    assert given[:3] == [(9, [[1, 6, 8]]), (15, [[1, 8, 6]]), (11, None)]
    assert given[9:11] == [(4, [[1, 4, 4]]), (5, None)]


def test_an_image_without_a_start_is_in_the_first_step(tmp_path: Path) -> None:
    source = next(path for path in GOLDEN_VISUAL if path.name == "rg10_one_image")
    case = shutil.copytree(source, tmp_path / "case")
    listener = Listener(source)
    del listener.trace["image_starts"]  # as the official script writes it
    np.savez(case / "trace.npz", allow_pickle=False, **listener.trace)
    assert replay_case(cast(Engine, listener), case).passed
    grids = [grids for _, _, grids in listener.steps if grids is not None]
    assert [grid.tolist() for grid in grids] == [[[1, 8, 12]]]
    assert listener.steps[0][1] is not None


@pytest.mark.parametrize(
    ("damage", "gone"),
    [("pixel_values", False), ("pixel_values", True), ("image_grid_thw", False), ("image_grid_thw", True),
     ("image_starts", False)],
)  # fmt: skip
def test_a_damaged_record(tmp_path: Path, damage: str, gone: bool) -> None:
    case = shutil.copytree(CUT, tmp_path / "case")
    with np.load(CUT / "trace.npz") as archive:
        trace = dict(archive)
    trace[damage] = trace[damage][:-1]
    if gone:
        del trace[damage]
    np.savez(case / "trace.npz", allow_pickle=False, **trace)
    with pytest.raises(OptionError, match="is not a recorded case"):
        replay_case(cast(Engine, Listener(CUT)), case)
