"""Replay a case recorded from the official code, and compare what it kept and computed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimkv_export.compat import Self
from trimkv_export.errors import OptionError
from trimkv_export.files import open_regular, read_regular
from trimkv_export.package import PackageConfig
from trimkv_export.runtime import Engine
from trimkv_export.words import first_line, shorten

__all__ = ["CaseReport", "RecordedCase", "replay_case"]

Arrays = dict[str, NDArray[Any]]

# Logits of the two agree to rounding, which a fixed difference bounds for the small models of the cases.
TOLERANCE = 2e-4
# Dimensions of images that all have one size: [images, channels, height, width].
IMAGES_OF_ONE_SIZE = 4


@dataclass(frozen=True)
class CaseReport:
    """Result of a replay.

    Attributes:
        case: name of the case's folder.
        steps: recorded steps.
        kept_mismatches: steps after which other entries are kept.
        first_mismatch: the first of these; None if there is none.
        max_logit_difference: largest absolute difference of a logit.
        tolerance: largest such difference that passes.
    """

    case: str
    steps: int
    kept_mismatches: int
    first_mismatch: int | None
    max_logit_difference: float
    tolerance: float = TOLERANCE

    @property
    def passed(self) -> bool:
        """Identical kept sets after every step, and logits within the tolerance."""
        return self.kept_mismatches == 0 and self.max_logit_difference <= self.tolerance

    def as_dict(self) -> dict[str, Any]:
        """For `verify --json`."""
        return {**vars(self), "passed": self.passed}


@dataclass(frozen=True, eq=False)
class RecordedCase:
    """What the official code computed for one conversation: a folder with two files.

    `case.json` has the arguments of the recording: layers, kv_heads, gate, budget, buffer, min_per_head, lookahead.
    `trace.npz` has the prompt `input_ids` [1, P] and the tokens `decoded` after it; `chunks`, the tokens of each step;
    and for each step i `step_i_logits` [tokens, V] and `step_i_kept` [entries, 3] of (layer, KV head, position). With
    images also `pixel_values` [patches, values], `image_grid_thw` [images, 3] and `image_starts`, their first tokens;
    or, of models whose images have one size, `pixel_values` [images, 3, height, width] alone.

    Attributes:
        path: the folder.
        arguments: what is in `case.json`.
        inputs: what `Session.step` takes, for each step.
        logits: [V] of the last token of each step.
        kept: [entries, 3] after each step.
    """

    path: Path
    arguments: Mapping[str, Any]
    inputs: Sequence[Mapping[str, Any]]
    logits: Sequence[NDArray[np.float32]]
    kept: Sequence[NDArray[np.int32]]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read a case.

        Raises:
            OptionError: the folder has no case, or a damaged one.
        """
        try:
            arguments = json.loads(read_regular(path / "case.json"))
            with open_regular(path / "trace.npz") as file, np.load(file) as archive:
                trace = dict(archive)
            tokens = np.concatenate([trace["input_ids"][0], trace["decoded"]])
            chunks = [int(chunk) for chunk in trace["chunks"]]
            ends = np.cumsum(chunks)
            inputs = [
                {"tokens": tokens[end - chunk : end].tolist()} | _images(trace, int(end) - chunk, int(end))
                for chunk, end in zip(chunks, ends, strict=True)
            ]
            steps = range(len(inputs))
            logits = [trace[f"step_{step}_logits"][-1] for step in steps]
            kept = [trace[f"step_{step}_kept"] for step in steps]
            if not isinstance(arguments, dict):
                raise ValueError(f"case.json holds {shorten(arguments)}")
        except Exception as error:  # of a damaged archive NumPy and zipfile raise a dozen kinds
            raise OptionError(
                f"{path}: is not a recorded case ({first_line(error)}); a case is a folder with case.json, the "
                "arguments of the recording, and trace.npz, the recorded steps"
            ) from None
        return cls(path, arguments, inputs, logits, kept)

    def require_same_build(self, config: PackageConfig) -> None:
        """Raise OptionError if a package was not built as the case was recorded."""
        found = {
            "layers": config.model.num_layers,
            "kv_heads": config.model.num_kv_heads,
            "gate": config.model.gate_kind,
            "budget": config.eviction.budget,
            "buffer": config.eviction.evict_every,
            "min_per_head": config.eviction.min_tokens_per_head,
            "lookahead": config.eviction.lookahead_steps,
        }
        for name, value in found.items():
            wanted = self.arguments.get(name)
            if name == "buffer":
                wanted = max(1, wanted or 0)  # the official code takes 0 for 1
            if wanted != value:
                raise OptionError(f"{self.path}: was recorded with {name} {wanted}, the package has {value}")
        longest = max(len(step["tokens"]) for step in self.inputs)
        if longest > config.prefill_chunk:
            raise OptionError(
                f"{self.path}: has steps of {longest} tokens, the package takes {config.prefill_chunk}; build it with "
                f"--prefill-chunk {longest}"
            )


def _images(trace: Arrays, start: int, stop: int) -> Arrays:
    """What `Session.step` takes besides tokens [start, stop): the images and videos that begin there, whole.

    Where an image goes on in later steps, those take tokens only. Raises ValueError and KeyError for a bad record.
    """
    if "pixel_values" not in trace and "image_grid_thw" not in trace:
        return {}
    pixels = trace["pixel_values"]
    if pixels.ndim == IMAGES_OF_ONE_SIZE:  # they begin in the first step
        return {"pixel_values": pixels} if start == 0 else {}
    grids = trace["image_grid_thw"]
    # Without recorded starts there is one image, in the first step.
    starts = trace.get("image_starts", np.zeros(len(grids), np.int64))
    patches = grids.prod(axis=1)
    if len(starts) != len(grids) or patches.sum() != len(pixels):
        raise ValueError(
            f"{len(starts)} images with {len(grids)} grids of {patches.sum()} patches, {len(pixels)} recorded"
        )
    begun = np.flatnonzero((starts >= start) & (starts < stop))
    if not begun.size:
        return {}
    parts = np.split(pixels, np.cumsum(patches)[:-1])
    return {"pixel_values": np.concatenate([parts[index] for index in begun]), "image_grid_thw": grids[begun]}


def _in_patches(inputs: Mapping[str, Any], path: Path, config: PackageConfig) -> Mapping[str, Any]:
    """A step's input, with images of one size cut into the patches that the tower takes, in reading order."""
    pixels = inputs.get("pixel_values")
    if pixels is None or pixels.ndim != IMAGES_OF_ONE_SIZE:
        return inputs
    side = config.vision.patch_size if config.vision else 0
    count, channels, *sizes = pixels.shape
    if not side or sizes[0] % side or sizes[1] % side:
        raise OptionError(
            f"{path}: has images of {sizes[0]} x {sizes[1]} pixels, and the package "
            f"{f'takes them in patches of {side}' if side else 'has no vision tower'}"
        )
    rows, columns = (size // side for size in sizes)
    cut = pixels.reshape(count, channels, rows, side, columns, side).transpose(0, 2, 4, 1, 3, 5)
    grid = np.tile(np.array([1, rows, columns], np.int64), (count, 1))
    return {**inputs, "pixel_values": cut.reshape(-1, channels * side * side), "image_grid_thw": grid}


def replay_case(engine: Engine, case: RecordedCase | Path) -> CaseReport:
    """Feed the recorded tokens in the recorded steps, and compare after each one.

    Args:
        engine: of a package that was built as the case was recorded.
        case: the case, or its folder.

    Raises:
        OptionError: there is no such case, or it was recorded with another model or other settings.
    """
    recorded = RecordedCase.open(case) if isinstance(case, Path) else case
    recorded.require_same_build(engine.config)
    mismatches, first, worst = 0, None, 0.0
    with engine.session() as session:
        for step, inputs in enumerate(recorded.inputs):
            logits = session.step(**_in_patches(inputs, recorded.path, engine.config))
            worst = float(np.maximum(worst, np.abs(logits - recorded.logits[step]).max()))  # NaN stays NaN, and fails
            if not np.array_equal(session.kept(), recorded.kept[step]):
                mismatches += 1
                first = step if first is None else first
    return CaseReport(recorded.path.name, len(recorded.inputs), mismatches, first, worst)
