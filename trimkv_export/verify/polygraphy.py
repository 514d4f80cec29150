"""ONNX Runtime and TensorRT on the same steps, compared by Polygraphy's comparator.

Polygraphy's own runners give inputs and outputs memory of their own, and the plugin takes the state in place only; so
the runners here are sessions. *Not run here* with TensorRT itself; tests run it on a stand-in.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimkv_export.config import Precision
from trimkv_export.errors import missing
from trimkv_export.package import Package, PackageConfig
from trimkv_export.runtime import Engine, Session
from trimkv_export.runtime.cache_memory import CacheMemory
from trimkv_export.runtime.session import MAX_TOKENS
from trimkv_export.verify.conversation import Conversation
from trimkv_export.verify.selfcheck import TOLERANCE

__all__ = ["BackendReport", "compare_backends"]

SIDES = ("cpu", "tensorrt")  # providers
STEPS = 24
# Pictures by the step in which they begin: temporal patches, rows and columns in tokens.
PICTURES = {0: (1, 2, 5), 6: (1, 4, 2), 12: (2, 3, 2)}
# Largest share of entries that may be kept by one side alone: rounding in half precision turns near ties.
KEPT_TOLERANCE = {Precision.FP32: 0.0, Precision.FP16: 0.01, Precision.BF16: 0.02}


@dataclass(frozen=True)
class BackendReport:
    """Result of a comparison.

    Attributes:
        steps: steps that were compared.
        tokens: tokens that were fed in them.
        kept_mismatches: steps after which one side alone keeps more entries than `kept_tolerance` of all.
        max_logit_difference: the largest, as a share of the largest logit.
        tolerance: the largest such difference that passes.
        kept_tolerance: the largest share of entries that may be kept by one side alone.
        passed: whether everything is within the tolerances.
    """

    steps: int
    tokens: int
    kept_mismatches: int
    max_logit_difference: float
    tolerance: float
    kept_tolerance: float
    passed: bool

    def as_dict(self) -> dict[str, Any]:
        """For `verify --json`."""
        return asdict(self)


def compare_backends(path: Path, *, trust_package_plugin: bool = False) -> BackendReport:
    """Run a package built for TensorRT by both, on random tokens, and on pictures if there is a vision tower.

    Before each step the second takes over the cache of the first, so that rounding does not add up.

    Args:
        path: the package.
        trust_package_plugin: as for `Engine.open`.

    Raises:
        MissingDependencyError: Polygraphy is not installed.
        TrimKVError: as `Engine.open`.
    """
    try:
        from polygraphy.backend.base import BaseRunner
        from polygraphy.common import TensorMetadata
        from polygraphy.comparator import Comparator, SimpleCompareFunc
        from polygraphy.logger import G_LOGGER
    except ImportError:
        raise missing("comparing with TensorRT", "polygraphy", "tensorrt") from None

    class SessionRunner(BaseRunner):  # type: ignore[misc]
        """A session as Polygraphy calls it: a step is an inference."""

        def __init__(self, provider: str, turns: "_Turns") -> None:
            super().__init__(name=provider)
            self.turns = turns

        def activate_impl(self) -> None:
            self.engine = Engine.open(path, self.name, context=MAX_TOKENS, trust_package_plugin=trust_package_plugin)
            self.session, self.step = self.engine.session(), 0

        def deactivate_impl(self) -> None:
            self.engine.close()
            del self.engine, self.session, self.step

        def get_input_metadata_impl(self) -> Any:
            metadata = TensorMetadata()
            for name, array in self.turns.feeds[0].items():
                metadata.add(name, array.dtype, (None, *array.shape[1:]))
            return metadata

        def infer_impl(self, feed_dict: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            self.turns.share_state(self.engine.memory, self.session, self.step)
            start = time.perf_counter()
            logits = _step(self.session, feed_dict)
            self.inference_time = time.perf_counter() - start
            self.step += 1
            # Polygraphy compares arrays; which entries are kept is a set, without an order.
            self.turns.kept[self.name].append(self.session.kept())
            return {"logits": logits, "counters": self.session.state["counters"].copy()}

    config = Package.open(path).config
    turns = _Turns.of(config)
    # It prints a lot, and divides by the values compared.
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), np.errstate(divide="ignore", invalid="ignore"):
        runs = Comparator.run([SessionRunner(name, turns) for name in SIDES], data_loader=turns.feeds)
        expected, found = (list(outputs) for outputs in runs.values())
        largest = max(1.0, *(float(np.abs(step["logits"]).max()) for step in expected))
        tolerance, kept_tolerance = TOLERANCE[config.precision], KEPT_TOLERANCE[config.precision]
        mismatches = sum(
            _difference(one, other) > kept_tolerance for one, other in zip(*turns.kept.values(), strict=True)
        )
        compared = Comparator.compare_accuracy(
            runs, compare_func=SimpleCompareFunc(rtol=0, atol={"logits": tolerance * largest, "counters": 0})
        )
    differences = [np.abs(one["logits"] - other["logits"]).max() for one, other in zip(expected, found, strict=True)]
    return BackendReport(
        steps=len(expected),
        tokens=sum(len(feed["input_ids"]) for feed in turns.feeds),
        kept_mismatches=mismatches,
        max_logit_difference=float(np.max(differences)) / largest,
        tolerance=tolerance,
        kept_tolerance=kept_tolerance,
        passed=bool(compared) and not mismatches,
    )


@dataclass
class _Turns:
    """The steps of both sides, the cache that the first side had before each, and what each side kept after it."""

    feeds: list[dict[str, NDArray[Any]]]
    states: list[bytes] = field(default_factory=list)
    kept: dict[str, list[NDArray[np.int32]]] = field(default_factory=lambda: {side: [] for side in SIDES})

    @classmethod
    def of(cls, config: PackageConfig) -> "_Turns":
        """Steps of one token, of a few and of a whole chunk, with pictures in between if there is a vision tower."""
        conversation = Conversation(config, np.random.default_rng(0))
        chunk = config.prefill_chunk
        feeds: list[dict[str, NDArray[Any]]] = []
        while len(feeds) < STEPS or conversation.pending:
            if config.vision is not None and (sizes := PICTURES.get(len(feeds))):
                conversation.add_picture(config.vision, *sizes)
            turn = conversation.take((chunk, 1, min(3, chunk))[len(feeds) % 3])
            feed: dict[str, NDArray[Any]] = {"input_ids": np.array(turn.tokens, np.int64)}
            if config.vision is not None:
                patches, grids = turn.pixel_values, turn.image_grid_thw
                nothing = np.zeros((0, config.vision.patch_dim), np.float32)
                feed["pixel_values"] = nothing if patches is None else patches
                feed["image_grid_thw"] = np.zeros((0, 3), np.int64) if grids is None else grids
            feeds.append(feed)
        return cls(feeds)

    def share_state(self, memory: CacheMemory, session: Session, step: int) -> None:
        """Note the session's cache before a step, or, of the second side, replace it."""
        if step == len(self.states):
            self.states.append(b"".join(array.tobytes() for array in session.state.values()))
        else:
            memory.write(session.row, self.states[step])


def _step(session: Session, feed: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    grids = feed.get("image_grid_thw")
    if grids is None or not len(grids):
        return session.step(feed["input_ids"].tolist())
    return session.step(feed["input_ids"].tolist(), feed["pixel_values"], grids)


def _difference(one: NDArray[np.int32], other: NDArray[np.int32]) -> float:
    """Entries that only one side kept, as a share of all."""
    sets = [set(map(tuple, kept.tolist())) for kept in (one, other)]
    return len(sets[0] ^ sets[1]) / max(1, 2 * len(sets[0]))
