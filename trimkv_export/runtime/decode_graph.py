"""Decode steps as CUDA graphs: captured once for each range of rows, then each step is one launch.

ONNX Runtime does the capture (provider option `enable_cuda_graph`). What matters here of how it does it:

- A run with a new `gpu_graph_id` executes the model once or more to make its allocations, captures it, and launches
  the capture. The cache is updated in place, so such a run would feed its tokens several times. A graph is therefore
  captured by a run of its own in which no row has a token, which leaves every row as it is.
- A run with a known id is the launch alone: bindings are not looked at, so inputs and outputs keep their addresses.
- A run with the id -1 is an ordinary one.
- A graph belongs to the thread that captured it; on another thread ONNX Runtime would capture again.
"""

import itertools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimkv_export.errors import EngineError
from trimkv_export.package import PackageConfig
from trimkv_export.policy import Slab
from trimkv_export.runtime.batch import DecodeInputs, RowToken
from trimkv_export.runtime.cache_memory import CacheMemory, bind_state
from trimkv_export.runtime.vision_tower import bind_visual

__all__ = ["DecodeGraph", "DecodeGraphs"]

GRAPH_ID = "gpu_graph_id"
NO_GRAPH = -1
FIRST_GRAPH = 1  # 0 is what a run without an id gets


class DecodeGraphs:
    """The graphs of one engine, captured when first needed, and the device buffers that they read and write.

    Attributes:
        ordinary: run options for all other steps.
    """

    def __init__(self, runtime: Any, backend: Any, memory: CacheMemory, slab: Slab, config: PackageConfig) -> None:
        self._runtime, self._backend, self._memory, self._slab = runtime, backend, memory, slab
        self._config = config
        self._rows = slab.entries[0].shape[0]
        self._graphs: dict[tuple[int, int], DecodeGraph] = {}
        self._buffers: dict[int, StepBuffers] = {}
        self._ids = itertools.count(FIRST_GRAPH)
        self._thread = threading.get_ident()
        self.ordinary = self._run_options(NO_GRAPH)

    def _run_options(self, graph: int) -> Any:
        options = self._runtime.RunOptions()
        options.add_run_config_entry(GRAPH_ID, str(graph))
        return options

    def of(self, rows: Sequence[int]) -> "DecodeGraph":
        """The graph that steps `rows`, captured now if it is the first step of its kind. The cache does not change.

        Each row has a graph of its own, for stepping alone; several share that of the first 2, 4, 8, … or all rows, so
        that there are few.

        Raises:
            EngineError: this is not the thread that opened the engine, or the capture fails.
        """
        if threading.get_ident() != self._thread:
            raise EngineError(
                f"thread {threading.current_thread().name!r} cannot decode with this engine: CUDA graphs belong to the "
                "thread that opened it; decode there, or open the package without cuda_graph"
            )
        first, end = (rows[0], rows[0] + 1) if len(rows) == 1 else (0, self._rounded(max(rows) + 1))
        graph = self._graphs.get((first, end))
        if graph is None:
            buffers = self._buffers.get(end - first)
            if buffers is None:
                buffers = StepBuffers(self._runtime, self._memory.device, end - first, self._config)
                self._buffers[end - first] = buffers
            graph = DecodeGraph(self._backend, self._memory, buffers, first, self._run_options(next(self._ids)))
            try:
                graph.capture(self._slab)
            except EngineError:
                raise
            except Exception as error:  # onnxruntime raises its own types
                raise EngineError(
                    f"ONNX Runtime could not capture a decode step of {end - first} rows in a CUDA graph: {error}; "
                    "open the package without cuda_graph"
                ) from error
            self._graphs[first, end] = graph
        return graph

    def capture_all(self) -> None:
        """Capture every graph that can be needed, so that no step has to."""
        for row in range(self._rows):
            self.of([row])
        for end in {self._rounded(count) for count in range(2, self._rows + 1)}:
            self.of(range(end))

    def _rounded(self, rows: int) -> int:
        return min(self._rows, 1 << (rows - 1).bit_length())


class StepBuffers:
    """Inputs and logits of a step of `rows` rows at fixed device addresses. Graphs of as many rows share them."""

    def __init__(self, runtime: Any, device: str, rows: int, config: PackageConfig) -> None:
        self.rows, self._config, self._host = rows, config, DecodeInputs(rows, config)
        make = runtime.OrtValue
        # Copies, for on the CPU (in tests) an OrtValue is the array itself.
        self._values = {
            name: make.ortvalue_from_numpy(array.copy(), device, 0) for name, array in self._host.of(rows).items()
        }
        self._logits = make.ortvalue_from_shape_and_type((rows, config.model.vocab_size), np.float32, device, 0)

    def bind(self, binding: Any) -> None:
        """Bind inputs and logits, once."""
        for name, value in self._values.items():
            binding.bind_ortvalue_input(name, value)
        if self._config.vision is not None:
            bind_visual(binding, self._config)
        binding.bind_ortvalue_output("logits", self._logits)

    def upload(self, work: Sequence[RowToken], first: int) -> None:
        """Copy the inputs of a step of rows from `first` on to the device, in place."""
        inputs = self._host.fill(work, first, self.rows)
        for name, value in self._values.items():
            value.update_inplace(inputs[name])

    def logits(self) -> NDArray[np.float32]:
        """Logits [rows, V], copied from the device."""
        return np.asarray(self._logits.numpy(), np.float32)


class DecodeGraph:
    """One token of any of `buffers.rows` rows from `first` on. Made and captured by `DecodeGraphs.of`."""

    def __init__(self, backend: Any, memory: CacheMemory, buffers: StepBuffers, first: int, options: Any) -> None:
        self._backend, self._memory, self._buffers = backend, memory, buffers
        self._first, self._options = first, options
        self._binding = backend.io_binding()
        self._tried = False

    def capture(self, slab: Slab) -> None:
        """Bind everything and let ONNX Runtime capture a step in which no row has a token."""
        bind_state(self._binding, self._memory, slab, self._first, self._first + self._buffers.rows)
        self._buffers.bind(self._binding)
        self._run(())

    def _run(self, work: Sequence[RowToken]) -> None:
        self._buffers.upload(work, self._first)
        self._backend.run_with_iobinding(self._binding, self._options)

    def step(self, work: Sequence[RowToken]) -> Mapping[int, NDArray[np.float32]]:
        """Feed one token a row -> row: logits [V].

        Raises:
            EngineError: the first step after the capture did not enter the cache exactly once.
        """
        self._run(work)
        if not self._tried:
            self._check_counters(work)
            self._tried = True
        logits = self._buffers.logits()
        return {entry.row: logits[entry.row - self._first] for entry in work}

    def _check_counters(self, work: Sequence[RowToken]) -> None:
        # Should ONNX Runtime ever capture otherwise than described above, the first step shows it.
        for entry in work:
            seen = int(self._memory.read(entry.row, "counters")["counters"][0])
            if seen != entry.tokens_seen + 1:
                raise EngineError(
                    f"a step in a CUDA graph left row {entry.row} at {seen} tokens, expected {entry.tokens_seen + 1}: "
                    "the runtime captures in another way than it should; open the package without cuda_graph"
                )
