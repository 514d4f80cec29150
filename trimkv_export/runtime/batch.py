"""Decode steps of several sessions at once: their rows lie side by side in the slab."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["DecodeBatch"]


class DecodeBatch:
    """Buffers and bindings for one token of any of the engine's rows. Made once; a step allocates nothing of ours.

    state: the ten state tensors of all rows, [rows, …] each: views of the slab.
    """

    def __init__(self, backend: Any, state: dict[str, NDArray[Any]], vocabulary: int) -> None:
        rows = state["counters"].shape[0]
        self._backend, self._state = backend, state
        self._tokens = np.zeros((rows, 1), np.int64)
        self._positions = np.zeros((rows, 1), np.int64)
        self._step_tokens = np.zeros(rows, np.int32)
        self._budget = np.ones(rows, np.int32)
        self._logits = np.zeros((rows, vocabulary), np.float32)
        self._binding = backend.io_binding()
        self._bound = (0, 0)

    def _bind(self, first: int, end: int) -> None:
        """Bind rows [first, end); those without a token in a step cost little, but no more are bound than needed."""
        if self._bound == (first, end):
            return
        inputs: dict[str, NDArray[Any]] = {f"past.{name}": array for name, array in self._state.items()}
        inputs["input_ids"], inputs["position_ids"] = self._tokens, self._positions
        inputs["step_tokens"], inputs["budget"] = self._step_tokens, self._budget
        outputs: dict[str, NDArray[Any]] = {f"present.{name}": array for name, array in self._state.items()}
        outputs["logits"] = self._logits
        for bind, arrays in ((self._binding.bind_input, inputs), (self._binding.bind_output, outputs)):
            for name, array in arrays.items():
                part = array[first:end]
                bind(name, "cpu", 0, part.dtype, part.shape, part.ctypes.data)
        self._bound = (first, end)

    def step(self, work: Sequence[tuple[int, int, int]]) -> NDArray[np.float32]:
        """Feed (row, token, budget), one token a row -> logits [rows, V], valid in the rows that had a token."""
        self._step_tokens.fill(0)
        for row, token, budget in work:
            self._tokens[row] = token
            self._positions[row] = self._state["counters"][row, 0]
            self._step_tokens[row] = 1
            self._budget[row] = budget
        rows = [row for row, _, _ in work]
        self._bind(min(rows), max(rows) + 1)
        self._backend.run_with_iobinding(self._binding)
        return self._logits
