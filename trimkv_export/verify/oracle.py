"""Replay a case recorded from the official code, and compare what it kept and computed."""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimkv_export.errors import VerificationError
from trimkv_export.runtime import Engine

__all__ = ["CaseReport", "replay_case"]

# Logits of the two agree to rounding, which a fixed difference bounds for the small models of the cases.
TOLERANCE = 2e-4


@dataclass(frozen=True)
class CaseReport:
    """Result of a replay."""

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


def _images(trace: dict[str, NDArray[Any]], start: int, stop: int) -> dict[str, NDArray[Any]]:
    """What `Session.step` takes besides tokens [start, stop): the images and videos that begin there, whole.

    Where an image goes on in later steps, those take tokens only. Raises ValueError and KeyError for a bad record.
    """
    if "pixel_values" not in trace and "image_grid_thw" not in trace:
        return {}
    grids, pixels = trace["image_grid_thw"], trace["pixel_values"]
    # The script itself records no starts: its one image is in the first step.
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


def replay_case(engine: Engine, case: Path) -> CaseReport:
    """Feed the recorded tokens in the recorded steps and compare after each one.

    Raises VerificationError when the case cannot be read, or does not belong to the package.
    """
    try:
        arguments = json.loads((case / "case.json").read_text())
        with (case / "trace.npz").open("rb") as file, np.load(file) as archive:
            trace = dict(archive)
        tokens = np.concatenate([trace["input_ids"][0], trace["decoded"]])
        chunks = [int(chunk) for chunk in trace["chunks"]]
        ends = np.cumsum(chunks)
        images = [_images(trace, int(end) - chunk, int(end)) for chunk, end in zip(chunks, ends, strict=True)]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise VerificationError(f"{case}: not a case of the oracle script: {error}") from None
    config = engine.config
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
        wanted = arguments.get(name)
        if name == "buffer":
            wanted = max(1, wanted or 0)
        if wanted != value:
            raise VerificationError(f"{case}: was recorded with {name} {wanted}, the package has {value}")
    if max(chunks) > config.prefill_chunk:
        raise VerificationError(
            f"{case}: has steps of {max(chunks)} tokens, the package takes {config.prefill_chunk}; build it with "
            f"--prefill-chunk {max(chunks)}"
        )

    mismatches, first, worst, start = 0, None, 0.0, 0
    with engine.session() as session:
        for step, length in enumerate(chunks):
            part = [int(token) for token in tokens[start : start + length]]
            logits = session.step(part, **images[step])
            start += length
            difference = np.abs(logits - trace[f"step_{step}_logits"][-1]).max()
            worst = float(np.maximum(worst, difference))  # NaN stays NaN, and fails
            if not np.array_equal(session.kept(), trace[f"step_{step}_kept"]):
                mismatches += 1
                first = step if first is None else first
    return CaseReport(case.name, len(chunks), mismatches, first, worst)
