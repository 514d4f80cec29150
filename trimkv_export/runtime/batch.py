"""Decode steps of several sessions at once: their rows lie side by side in the slab."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimkv_export.package import PackageConfig
from trimkv_export.policy import Slab
from trimkv_export.runtime.cache_memory import CacheMemory, bind_state
from trimkv_export.runtime.vision_tower import bind_visual

__all__ = ["DecodeBatch", "DecodeInputs", "RowToken"]


class RowToken(NamedTuple):
    """The token that a row feeds in a decode step."""

    row: int
    token: int
    position: int
    tokens_seen: int
    budget: int


class DecodeInputs:
    """Host arrays of the inputs of a decode step, one token a row."""

    def __init__(self, rows: int, config: PackageConfig) -> None:
        self._axes = 1 if config.model.rope.axes is None else 3
        self._tokens = np.zeros((rows, 1), np.int64)
        self._positions = np.zeros(self._axes * rows, np.int64)
        self._step_tokens = np.zeros(rows, np.int32)
        self._budget = np.ones(rows, np.int32)

    def of(self, rows: int) -> dict[str, NDArray[Any]]:
        """The arrays, by input, for the first `rows` rows."""
        shape = (rows, 1) if self._axes == 1 else (self._axes, rows, 1)
        return {
            "input_ids": self._tokens[:rows],
            "position_ids": self._positions[: self._axes * rows].reshape(shape),
            "step_tokens": self._step_tokens[:rows],
            "budget": self._budget[:rows],
        }

    def fill(self, work: Sequence[RowToken], first: int, rows: int) -> dict[str, NDArray[Any]]:
        """Write the tokens of a step of rows [first, first + rows); returns `of(rows)`."""
        inputs = self.of(rows)
        self._step_tokens.fill(0)
        for entry in work:
            at = entry.row - first
            inputs["input_ids"][at] = entry.token
            inputs["position_ids"][..., at, 0] = entry.position
            inputs["step_tokens"][at] = 1
            inputs["budget"][at] = entry.budget
        return inputs


class DecodeBatch:
    """Buffers and bindings for one token of any of the engine's rows. Made once; a step allocates nothing of ours."""

    def __init__(self, backend: Any, memory: CacheMemory, slab: Slab, config: PackageConfig) -> None:
        rows = slab.entries[0].shape[0]
        self._backend, self._memory, self._slab = backend, memory, slab
        self._inputs = DecodeInputs(rows, config)
        self._logits = np.zeros((rows, config.model.vocab_size), np.float32)
        self._binding = backend.io_binding()
        if config.vision is not None:
            bind_visual(self._binding, config)
        self._bound = (0, 0)

    def _bind(self, first: int, end: int, inputs: dict[str, NDArray[Any]]) -> None:
        """Bind rows [first, end); those without a token in a step cost little, but no more are bound than needed."""
        new = self._bound != (first, end)
        if new:
            bind_state(self._binding, self._memory, self._slab, first, end)
            self._bound = first, end
            part = self._logits[first:end]
            self._binding.bind_output("logits", "cpu", 0, part.dtype, part.shape, part.ctypes.data)
        if new or self._memory.device != "cpu":  # for a GPU, host inputs are copied when they are bound
            for name, array in inputs.items():
                self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def step(self, work: Sequence[RowToken]) -> NDArray[np.float32]:
        """Feed one token a row -> logits [rows, V], valid in rows that had a token."""
        rows = [entry.row for entry in work]
        first, end = min(rows), max(rows) + 1
        self._bind(first, end, self._inputs.fill(work, first, end - first))
        self._backend.run_with_iobinding(self._binding)
        return self._logits
