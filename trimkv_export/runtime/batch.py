"""Decode steps of several sessions at once: their rows lie side by side in the slab."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimkv_export.memory import Slab
from trimkv_export.runtime.cache_memory import CacheMemory, bind_state

__all__ = ["DecodeBatch"]


class DecodeBatch:
    """Buffers and bindings for one token of any of the engine's rows. Made once; a step allocates nothing of ours."""

    def __init__(self, backend: Any, memory: CacheMemory, slab: Slab, vocabulary: int) -> None:
        rows = slab.entries[0].shape[0]
        self._backend, self._memory, self._slab = backend, memory, slab
        self._inputs: dict[str, NDArray[Any]] = {
            "input_ids": np.zeros((rows, 1), np.int64),
            "position_ids": np.zeros((rows, 1), np.int64),
            "step_tokens": np.zeros(rows, np.int32),
            "budget": np.ones(rows, np.int32),
        }
        self._logits = np.zeros((rows, vocabulary), np.float32)
        self._binding = backend.io_binding()
        self._bound = (0, 0)

    def _bind(self, first: int, end: int) -> None:
        """Bind rows [first, end); those without a token in a step cost little, but no more are bound than needed."""
        new = self._bound != (first, end)
        if new:
            bind_state(self._binding, self._memory, self._slab, first, end)
            self._bound = first, end
            part = self._logits[first:end]
            self._binding.bind_output("logits", "cpu", 0, part.dtype, part.shape, part.ctypes.data)
        if new or self._memory.device != "cpu":  # for a GPU, host inputs are copied when they are bound
            for name, array in self._inputs.items():
                part = array[first:end]
                self._binding.bind_input(name, "cpu", 0, part.dtype, part.shape, part.ctypes.data)

    def step(self, work: Sequence[tuple[int, int, int, int]]) -> NDArray[np.float32]:
        """Feed (row, token, position, budget), one token a row -> logits [rows, V], valid in rows that had a token."""
        self._inputs["step_tokens"].fill(0)
        for row, token, position, budget in work:
            self._inputs["input_ids"][row] = token
            self._inputs["position_ids"][row] = position
            self._inputs["step_tokens"][row] = 1
            self._inputs["budget"][row] = budget
        rows = [row for row, *_ in work]
        self._bind(min(rows), max(rows) + 1)
        self._backend.run_with_iobinding(self._binding)
        return self._logits
