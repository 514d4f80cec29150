"""One conversation: its row of the cache, and the steps that update it in place."""

import contextlib
import operator
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trimkv_export.compat import Self
from trimkv_export.errors import EngineError, OptionError
from trimkv_export.package import PackageConfig, VisionInfo
from trimkv_export.policy import Slab, kept_entries
from trimkv_export.runtime.batch import RowToken
from trimkv_export.runtime.cache_memory import CacheMemory, bind_state
from trimkv_export.runtime.decode_graph import DecodeGraph, DecodeGraphs
from trimkv_export.runtime.snapshot import Snapshot, write_snapshot
from trimkv_export.runtime.vision_tower import Picture, VisionTower, VisualFeed, bind_visual, raw_pictures
from trimkv_export.text.sampling import Sampler, SamplingOptions
from trimkv_export.text.tokenizer import Tokenizer
from trimkv_export.vision.image_files import ImageSource
from trimkv_export.vision.reader import PictureReader, Video, VisualPrompt

__all__ = ["Session"]

# (tokens fed, tokens of the prompt)
PromptProgress = Callable[[int, int], None]

# Positions are int32 in the cache.
MAX_TOKENS = np.iinfo(np.int32).max


class Host(Protocol):
    """What a session needs of the engine that it belongs to."""

    backend: Any
    config: PackageConfig
    memory: CacheMemory
    slab: Slab
    graphs: DecodeGraphs | None
    vision: VisionTower | None

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def pictures(self) -> PictureReader: ...
    @property
    def vision_info(self) -> VisionInfo: ...
    def run(self, binding: Any) -> None: ...
    def release_row(self, row: int) -> None: ...


class Session:
    """A conversation; made by `Engine.session` or `Engine.restore`. A context manager that frees its row.

    All buffers are made here, once; a step writes into them and into the cache row, and nothing else of ours.

    Attributes:
        budget: kept entries per stream on average.
        row: its row of the slab, -1 once closed.
        tokens_seen: tokens fed so far.
    """

    def __init__(self, engine: Host, row: int, budget: int) -> None:
        self._engine, self.row, self.budget = engine, row, budget
        config = engine.config
        self.tokens_seen = 0
        self._memory = engine.memory
        self._visual = None if config.vision is None else VisualFeed(engine.vision, config, config.vision)
        self._axes = 1 if config.model.rope.axes is None else 3
        self._tokens = np.zeros((1, config.prefill_chunk), np.int64)
        self._positions = np.zeros(self._axes * config.prefill_chunk, np.int64)
        self._step_tokens = np.zeros(1, np.int32)
        self._budget = np.array([budget], np.int32)
        self._logits = np.zeros((1, config.model.vocab_size), np.float32)
        self._ramp = np.arange(config.prefill_chunk, dtype=np.int64)
        # Decoding binds once; prefill binds again when its length changes.
        self._decode = self._binding()
        self._bind_inputs(self._decode, 1)
        if self._visual is not None:
            bind_visual(self._decode, config)
        self._prefill = self._binding()
        self._prefill_sizes = (0, 0)
        self._clear()

    def _binding(self) -> Any:
        binding = self._engine.backend.io_binding()
        bind_state(binding, self._memory, self._engine.slab, self.row, self.row + 1)
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

    @property
    def state(self) -> dict[str, NDArray[Any]]:
        """The row's ten state tensors (docs/design.md, section 4), without the batch dimension: views, on the CPU."""
        self._check_open()
        return self._memory.read(self.row)

    @property
    def next_position(self) -> int:
        """Position of the next token: the number of tokens so far, or with M-RoPE less, as an image takes few."""
        return self.tokens_seen if self._visual is None else self._visual.positions.next_position

    def position_after(self, prompt: VisualPrompt) -> int:
        """`next_position` once `prompt` was fed. Raises OptionError if its tokens and pictures do not fit together."""
        if self._visual is None:
            return self.tokens_seen + len(prompt.tokens)
        return self._visual.position_after(prompt.tokens, prompt.pictures)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the row back. The session cannot be used any more."""
        if self.row >= 0:
            self._clear()
            self._engine.release_row(self.row)
            self.row = -1

    @property
    def evictions(self) -> int:
        """Evictions so far."""
        self._check_open()
        return int(self._memory.read(self.row, "counters")["counters"][3])

    def reset(self) -> None:
        """Forget everything: the next step starts a new conversation. Raises EngineError once closed."""
        self._check_open()
        self._clear()

    def _clear(self) -> None:
        self._memory.reset(self.row)
        if self._visual is not None:
            self._visual.reset()
        self.tokens_seen = 0
        self._failed = False

    def check_tokens(self, tokens: Sequence[int], pictures: Sequence[Picture] = ()) -> None:
        """Raise OptionError or EngineError if a step of these tokens, with these pictures beginning, would."""
        self._check_valid()
        chunk = self._engine.config.prefill_chunk
        if not 1 <= len(tokens) <= chunk:
            raise OptionError(
                f"a step takes 1 to {chunk} tokens (the prefill chunk of the package), got {len(tokens)}; "
                "use prefill() for longer prompts"
            )
        self._check_prompt(tokens, pictures)

    def is_decode(self, tokens: Sequence[int]) -> bool:
        """Whether a step of these tokens is one token of text. For the engine."""
        return len(tokens) == 1 and (self._visual is None or not self._visual.is_visual(tokens)[0])

    def _check_open(self) -> None:
        if self.row < 0 or self._engine.backend is None:
            raise EngineError("this session was closed; start another with Engine.session()")

    def _check_valid(self) -> None:
        self._check_open()
        if self._failed:
            raise EngineError("an earlier step of this session failed midway, so its cache is not valid; call reset()")

    def _check_prompt(self, tokens: Sequence[int], pictures: Sequence[Picture], *, whole: bool = False) -> None:
        """The checks that do not depend on the length of a step. whole: no picture may be left unfinished."""
        self._check_valid()
        vocabulary = self._engine.config.model.vocab_size
        for token in tokens:
            try:
                known = 0 <= operator.index(token) < vocabulary
            except TypeError:
                known = False
            if not known:
                raise OptionError(f"token ids are whole numbers from 0 to {vocabulary - 1}, got {token}")
        if self.tokens_seen + len(tokens) > MAX_TOKENS:
            raise EngineError(f"a session takes at most {MAX_TOKENS:,} tokens; call reset()")
        if self._visual is not None:
            self._visual.check(tokens, pictures, whole=whole)

    def step(
        self,
        tokens: Sequence[int],
        pixel_values: NDArray[np.float32] | None = None,
        image_grid_thw: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float32]:
        """Feed 1 to C tokens and return the logits [V] of the last one (a copy).

        Args:
            tokens: token ids; each image token stands for one token of a picture.
            pixel_values: [patches, patch_dim] float32, the patches of every picture that begins in this step, as the
                reference processor makes them. What of a picture does not fit into this step comes with the next
                ones, which take its tokens alone; until then the array must not change.
            image_grid_thw: [pictures, 3], (t, h, w) of each in patches. Where a model counts a video's seconds, each of
                the t takes one, as for the reference without times; `prefill` reads how long they take.

        Raises OptionError for bad tokens or pictures, and EngineError when the engine fails. If it is the vision tower
        that fails, nothing has changed; else the cache is not valid.
        """
        if pixel_values is None and image_grid_thw is None:
            return self._step(tokens).copy()
        pictures = raw_pictures(pixel_values, image_grid_thw, self._engine.vision_info.patch_dim)
        self.check_tokens(tokens, pictures)
        with self._adding(pictures):
            return self._step(tokens).copy()

    @contextlib.contextmanager
    def _adding(self, pictures: Sequence[Picture]) -> Iterator[None]:
        """Queue pictures. Whatever ends this early, Ctrl-C too: the next prompt must not get what is left of them."""
        if self._visual is None:
            yield
            return
        mark, seen = self._visual.mark(), self.tokens_seen
        try:
            self._visual.add(pictures)
            yield
        except BaseException:
            if self.tokens_seen == seen:
                self._visual.rollback(mark)
            else:
                self._visual.drop()
            raise

    def _step(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        self.check_tokens(tokens)
        length, decode = len(tokens), self.is_decode(tokens)
        if decode and self._engine.graphs is not None:
            return self._step_graph(self._engine.graphs.of([self.row]), tokens[0])
        self._tokens[0, :length] = tokens
        sizes = length, self._place(length)  # encodes pictures: if that fails, the cache is as it was
        with self.stepping(length):
            self._step_tokens[0] = length
            binding, bound = (self._decode, sizes) if decode else (self._prefill, self._prefill_sizes)
            if sizes != bound or self._memory.device != "cpu":  # for a GPU, host inputs are copied when they are bound
                self._bind_inputs(binding, length)
                if self._visual is not None:
                    bind_visual(binding, self._engine.config, self._visual)
            if not decode:
                self._prefill_sizes = sizes
            self._engine.run(binding)
        row: NDArray[np.float32] = self._logits[0]
        return row

    def _place(self, length: int) -> int:
        """Write the positions of a step, and what it has of pictures; returns its number of visual tokens."""
        if self._visual is None:
            np.add(self._ramp[:length], self.tokens_seen, out=self._positions[:length])
            return 0
        positions = self._visual.begin(self._tokens[0, :length])
        self._positions[: positions.size] = positions.reshape(-1)
        return self._visual.count

    def decode_entry(self, token: int) -> RowToken:
        """A decode step of this row, begun: its position is taken. For the engine."""
        position = self.next_position
        if self._visual is not None:
            self._visual.begin(np.array([token], np.int64))
        return RowToken(self.row, token, position, self.tokens_seen, self.budget)

    def _step_graph(self, graph: DecodeGraph, token: int) -> NDArray[np.float32]:
        with self.stepping(1):
            logits = graph.step([self.decode_entry(token)])
        return logits[self.row]

    @contextlib.contextmanager
    def stepping(self, length: int) -> Iterator[None]:
        """Around a step of `length` tokens: the cache is not valid until it has ended well. For the engine."""
        self._failed = True
        try:
            yield
        except EngineError:
            raise
        except Exception as error:  # onnxruntime raises its own types
            raise EngineError(f"ONNX Runtime failed in a step of {length} tokens: {error}") from error
        self.tokens_seen += length
        self._failed = False

    def load(self, snapshot: Snapshot) -> None:
        """Take over the state of a session file. For the engine."""
        self._memory.write(self.row, snapshot.payload)
        self.tokens_seen = snapshot.tokens_seen
        if self._visual is not None:
            self._visual.reset(snapshot.next_position)

    def prefill(
        self,
        tokens: Sequence[int] | VisualPrompt,
        images: Sequence[ImageSource] | None = None,
        videos: Sequence[Video] | None = None,
        *,
        progress: PromptProgress | None = None,
    ) -> NDArray[np.float32]:
        """Feed any number of tokens, in steps of at most C, and return the logits [V] of the last (a copy).

        Args:
            tokens: the prompt, with one image (video) token for each image (video), or as many as it has; or a prompt
                that `Engine.pictures` has read.
            images: files, bytes, Pillow images or arrays, in the order of their places in the prompt.
            videos: likewise; see `Video`.
            progress: called after each step with the tokens fed and the tokens in all.

        Raises as `step`; a picture that cannot be read is an OptionError, and nothing has been fed then.
        """
        prompt = self._read(tokens, images, videos)
        return self._feed(prompt, progress, whole=bool(prompt.pictures)).copy()

    def _read(
        self,
        tokens: Sequence[int] | VisualPrompt,
        images: Sequence[ImageSource] | None,
        videos: Sequence[Video] | None,
    ) -> VisualPrompt:
        for name, given in (("images", images), ("videos", videos)):
            if given is not None and (isinstance(given, str | bytes) or not isinstance(given, Sequence)):
                raise OptionError(f"{name} must be a list, got {type(given).__name__}; put a single one into a list")
        if isinstance(tokens, VisualPrompt):
            if images or videos:
                raise OptionError("the prompt comes with its pictures; give images and videos with plain tokens only")
            return tokens
        if not images and not videos:
            return VisualPrompt(tokens)
        return self._engine.pictures.read(tokens, images or (), videos or ())

    def _feed(self, prompt: VisualPrompt, progress: PromptProgress | None, *, whole: bool) -> NDArray[np.float32]:
        chunk, total = self._engine.config.prefill_chunk, len(prompt.tokens)
        self._check_prompt(prompt.tokens, prompt.pictures, whole=whole)  # all of it, before the first step
        done = 0
        for logits in self.feed(prompt, whole=whole):  # noqa: B007 (the last is the result)
            done = min(done + chunk, total)
            if progress:
                progress(done, total)
        return logits

    def feed(
        self, prompt: VisualPrompt, *, chunk: int | None = None, whole: bool = True
    ) -> Generator[NDArray[np.float32], None, None]:
        """Feed a prompt, one step each time it is asked, and yield the logits [V] after it: the session's own buffer.

        Args:
            prompt: at least one token; with pictures, as `Engine.pictures` reads it.
            chunk: tokens of a step, 1 to C (the default).
            whole: refuse a prompt that ends within a picture.

        If it is closed before its end, pictures that are still to be fed are left out.

        Raises as `step`, for the tokens of each; for pictures that do not fit the prompt, before the first.
        """
        tokens, pictures = prompt.tokens, prompt.pictures
        if not len(tokens):
            raise OptionError("the prompt is empty; give at least one token")
        if pictures:
            self._check_prompt(tokens, pictures, whole=whole)
        chunk = self._engine.config.prefill_chunk if chunk is None else chunk
        with self._adding(pictures):
            for start in range(0, len(tokens), chunk):
                yield self._step(tokens[start : start + chunk])

    def generate(
        self,
        tokens: Sequence[int] | VisualPrompt,
        max_new_tokens: int,
        sampling: SamplingOptions | None = None,
        *,
        images: Sequence[ImageSource] | None = None,
        videos: Sequence[Video] | None = None,
        stop_ids: frozenset[int] | None = None,
        progress: PromptProgress | None = None,
    ) -> Iterator[int]:
        """Feed `tokens` and yield new ones; a stop token ends the text and is not yielded.

        A token is fed when the next one is asked for, so the last one yielded is not in the cache yet: pass it first
        when the conversation goes on.

        Args:
            tokens: the prompt, or the next turn.
            max_new_tokens: at most so many are yielded.
            sampling: greedy by default. Tokens that stand for pictures are never chosen.
            images, videos: as for `prefill`.
            stop_ids: default: the end-of-text tokens of the package's tokenizer.
            progress: as for `prefill`.

        Raises:
            OptionError: a bad token, picture or option.
            EngineError: the engine fails.
        """
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise OptionError(f"max_new_tokens must be a whole number above 0, got {max_new_tokens!r}")
        stop = self._engine.tokenizer.eos_ids if stop_ids is None else stop_ids
        sampler = Sampler(sampling or SamplingOptions())
        prompt = self._read(tokens, images, videos)
        sampler.observe(prompt.tokens)
        return self._generate(prompt, max_new_tokens, sampler, stop, progress)

    def _generate(
        self,
        prompt: VisualPrompt,
        max_new_tokens: int,
        sampler: Sampler,
        stop: frozenset[int],
        progress: PromptProgress | None,
    ) -> Iterator[int]:
        logits = self._feed(prompt, progress, whole=True)
        del prompt  # the pixels of its pictures
        never = list(self._engine.config.placeholder_ids)
        for index in range(max_new_tokens):
            logits[never] = -np.inf  # a session's own buffer
            token = sampler(logits)
            if token in stop:
                return
            yield token
            if index + 1 < max_new_tokens:
                logits = self._step((token,))

    def kept(self) -> NDArray[np.int32]:
        """Every live cache entry as rows (layer, KV head, position), sorted: [entries, 3]."""
        self._check_open()
        needed = ("counters", "stream_start", "slot_index", "pool_position")
        return kept_entries(self._memory.read(self.row, *needed), self._engine.config.cache)

    def snapshot(self) -> Snapshot:
        """A copy of the session's state, of fixed size, for `Engine.resume`. Raises EngineError within an image."""
        self._check_valid()
        if self._visual is not None and not self._visual.empty:
            raise EngineError(
                f"the session has {self._visual.positions.visual_tokens_left} tokens of an image still to come; feed "
                "them before it is saved"
            )
        payload = b"".join(np.ascontiguousarray(array).tobytes() for array in self.state.values())
        return Snapshot(self._engine.config.digest, self.budget, self.tokens_seen, self.next_position, payload)

    def save(self, path: Path | str) -> None:
        """Write the session to a file of fixed size, for `Engine.restore`.

        Raises OutputError, and EngineError in the middle of an image.
        """
        write_snapshot(Path(path), self.snapshot())
