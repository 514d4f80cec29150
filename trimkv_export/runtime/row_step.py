"""The buffers and bindings with which one session runs its steps."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trimkv_export.package import PackageConfig, VisionInfo
from trimkv_export.policy import Slab
from trimkv_export.runtime.cache_memory import CacheMemory, bind_state
from trimkv_export.runtime.decode_graph import DecodeGraphs
from trimkv_export.runtime.vision_tower import VisionTower, VisualFeed, bind_visual
from trimkv_export.text.tokenizer import Tokenizer
from trimkv_export.vision.reader import PictureReader

__all__ = ["RowStep"]


class Host(Protocol):
    """What a session needs of the engine that it belongs to."""

    backend: Any
    config: PackageConfig
    memory: CacheMemory
    slab: Slab
    graphs: DecodeGraphs | None
    vision: VisionTower | None
    context: int

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def pictures(self) -> PictureReader: ...
    @property
    def vision_info(self) -> VisionInfo: ...
    def run(self, binding: Any) -> None: ...
    def release_row(self, row: int) -> None: ...


class RowStep:
    """Steps of one row, of 1 to C tokens. All buffers are made here, once; decoding binds once, too."""

    def __init__(self, engine: Host, row: int, budget: int, visual: VisualFeed | None) -> None:
        self._engine, self._row, self._visual = engine, row, visual
        config = engine.config
        self._axes = 1 if config.model.rope.axes is None else 3
        self._tokens = np.zeros((1, config.prefill_chunk), np.int64)
        self._positions = np.zeros(self._axes * config.prefill_chunk, np.int64)
        self._step_tokens = np.zeros(1, np.int32)
        self._budget = np.array([budget], np.int32)
        self._logits = np.zeros((1, config.model.vocab_size), np.float32)
        self._ramp = np.arange(config.prefill_chunk, dtype=np.int64)
        self._decode = self._binding()
        self._bind_inputs(self._decode, 1)
        if visual is not None:
            bind_visual(self._decode, config)
        self._prefill = self._binding()
        self._prefill_sizes = (0, 0)  # prefill binds again when these change

    def _binding(self) -> Any:
        binding = self._engine.backend.io_binding()
        bind_state(binding, self._engine.memory, self._engine.slab, self._row, self._row + 1)
        logits = self._logits
        binding.bind_output("logits", "cpu", 0, logits.dtype, logits.shape, logits.ctypes.data)
        return binding

    def _bind_inputs(self, binding: Any, length: int) -> None:
        positions = (1, length) if self._axes == 1 else (self._axes, 1, length)
        for name, array, shape in (
            ("input_ids", self._tokens, (1, length)),
            ("position_ids", self._positions, positions),
            ("step_tokens", self._step_tokens, (1,)),
            ("budget", self._budget, (1,)),
        ):
            binding.bind_input(name, "cpu", 0, array.dtype, shape, array.ctypes.data)

    def place(self, tokens: Sequence[int], seen: int) -> int:
        """Write the tokens of a step, their positions after `seen` tokens, and what the step has of pictures.

        Returns:
            The number of visual tokens.

        Raises:
            EngineError: the vision tower fails.
        """
        length = len(tokens)
        self._tokens[0, :length] = tokens
        if self._visual is None:
            np.add(self._ramp[:length], seen, out=self._positions[:length])
            return 0
        positions = self._visual.begin(self._tokens[0, :length])
        self._positions[: positions.size] = positions.reshape(-1)
        return self._visual.count

    def run(self, length: int, visual: int, *, decode: bool) -> NDArray[np.float32]:
        """Run the step that was placed, and return its logits [V]: the buffer.

        Args:
            length: its tokens.
            visual: what `place` returned.
            decode: it is one token of text.
        """
        self._step_tokens[0] = length
        sizes = length, visual
        binding, bound = (self._decode, sizes) if decode else (self._prefill, self._prefill_sizes)
        if (
            sizes != bound or self._engine.memory.device != "cpu"
        ):  # for a GPU, host inputs are copied when they are bound
            self._bind_inputs(binding, length)
            if self._visual is not None:
                bind_visual(binding, self._engine.config, self._visual)
        if not decode:
            self._prefill_sizes = sizes
        self._engine.run(binding)
        row: NDArray[np.float32] = self._logits[0]
        return row
