"""One conversation: its row of the cache, and the steps that update it in place."""

import contextlib
import operator
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimkv_export.checks import require_whole
from trimkv_export.compat import Self
from trimkv_export.errors import EngineError, OptionError
from trimkv_export.policy import kept_entries
from trimkv_export.runtime.batch import RowToken
from trimkv_export.runtime.row_step import Host, RowStep
from trimkv_export.runtime.snapshot import Snapshot, write_snapshot
from trimkv_export.runtime.vision_tower import Picture, VisualFeed, raw_pictures
from trimkv_export.text.sampling import Sampler, SamplingOptions, TokenHistory
from trimkv_export.text.tokenizer import TextStream
from trimkv_export.vision.image_files import ImageSource
from trimkv_export.vision.reader import Video, VisualPrompt
from trimkv_export.words import shorten

__all__ = ["MAX_TOKENS", "Session"]

# (tokens fed, tokens of the prompt)
PromptProgress = Callable[[int, int], None]

# Positions are int32 in the cache.
MAX_TOKENS = np.iinfo(np.int32).max


class Session:
    """A conversation; made by `Engine.session` or `Engine.restore`. A context manager that frees its row.

    All buffers are made here, once; a step writes into them and into the cache row, and nothing else of ours. A session
    that nobody holds any more gives its row back by itself.

    Attributes:
        budget: kept entries per stream on average.
        row: its row of the slab, -1 once closed.
        tokens_seen: tokens fed so far.
        history: tokens that were fed, and how often `generate` chose each, over all turns: what penalties go by.
        pending: the tokens that `generate` yielded last and that are not in the cache: the last one, or none if a stop
            token ended the text. The next turn begins with them. Empty once anything is fed.
        finish_reason: how the last `generate` ended: "stop" by a stop token, "length" by a limit; None until it has.
    """

    def __init__(self, engine: Host, row: int, budget: int) -> None:
        self._engine, self.row, self.budget = engine, row, budget
        config = engine.config
        self.tokens_seen = 0
        self.history = TokenHistory(config.model.vocab_size)
        self._memory = engine.memory
        self._visual = None if config.vision is None else VisualFeed(engine.vision, config, config.vision)
        self._row_step = RowStep(engine, row, budget, self._visual)
        self._clear()
        # From here on the row is given back once, by `close` or when nobody holds the session any more.
        self._release = weakref.finalize(self, engine.release_row, row)
        self._release.atexit = False

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
        """`next_position` once `prompt` was fed.

        Raises:
            OptionError: its tokens and pictures do not fit together.
        """
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
            self.row = -1
            self._release()

    @property
    def evictions(self) -> int:
        """Evictions so far."""
        self._check_open()
        return int(self._memory.read(self.row, "counters")["counters"][3])

    def reset(self) -> None:
        """Forget everything: the next step starts a new conversation.

        Raises:
            EngineError: the session was closed.
        """
        self._check_open()
        self._clear()

    def _clear(self) -> None:
        self._memory.reset(self.row)
        if self._visual is not None:
            self._visual.reset()
        self.tokens_seen = 0
        self.history.clear()
        self.pending: tuple[int, ...] = ()
        self.finish_reason: str | None = None
        self._generating: object = None  # what stands for the open generate()
        self._failed = False

    def check_tokens(self, tokens: Sequence[int], pictures: Sequence[Picture] = ()) -> None:
        """Check that a step can take these tokens, with these pictures beginning.

        Raises:
            OptionError: it cannot.
            EngineError: the session was closed, its cache is not valid, or a `generate` is open.
        """
        self._check_idle()
        self._check_step(tokens, pictures)

    def _check_idle(self) -> None:
        if self._generating is not None:
            raise EngineError(
                "a generate() of this session is still open, and two texts would run into each other; take all of its "
                "tokens, or call its close(), or start another session"
            )

    def _check_step(self, tokens: Sequence[int], pictures: Sequence[Picture] = ()) -> None:
        self._check_valid()
        _check_kind(tokens)
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

    def _check_prompt(
        self, tokens: Sequence[int], pictures: Sequence[Picture], *, whole: bool = False, new: int = 0
    ) -> None:
        """The checks that do not depend on the length of a step.

        Args:
            tokens, pictures: as for a step.
            whole: no picture may be left unfinished.
            new: tokens that must find room after these.
        """
        self._check_valid()
        vocabulary = self._engine.config.model.vocab_size
        for token in tokens:
            try:
                known = 0 <= operator.index(token) < vocabulary
            except TypeError:
                known = False
            if not known:
                raise OptionError(f"token ids are whole numbers from 0 to {vocabulary - 1}, got {shorten(token)}")
        if self.tokens_seen + len(tokens) > MAX_TOKENS:
            raise EngineError(f"a session takes at most {MAX_TOKENS:,} tokens; call reset()")
        after = self.next_position + len(tokens)
        if self._visual is not None:
            self._visual.check(tokens, pictures, whole=whole)
            if pictures or not self._visual.empty:  # their tokens do not count on one by one
                after = self._visual.position_after(tokens, pictures)
        context = self._engine.context
        if after + new > context:
            what = "token does" if len(tokens) == 1 else "tokens do"
            raise OptionError(
                f"{len(tokens):,} {what} not fit: the conversation would have {after:,} positions, and this engine "
                f"takes {context:,}{', one of them for the answer' if new else ''}; shorten the prompt, start another "
                "session, or open the package with a larger context"
            )

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

        Raises:
            OptionError: bad tokens or pictures.
            EngineError: the engine fails. If it is the vision tower that fails, nothing has changed; else the cache is
                not valid.
        """
        self._check_idle()
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
        self._check_step(tokens)
        length, decode = len(tokens), self.is_decode(tokens)
        if decode and self._engine.graphs is not None:
            graph = self._engine.graphs.of([self.row])
            with self.stepping(1):
                return graph.step([self.decode_entry(tokens[0])])[self.row]
        visual = self._row_step.place(
            tokens, self.tokens_seen
        )  # encodes pictures: if that fails, the cache is as it was
        with self.stepping(length):
            logits = self._row_step.run(length, visual, decode=decode)
        self._note_fed(tokens)
        return logits

    def _note_fed(self, tokens: Sequence[int] | NDArray[np.int64]) -> None:
        self.history.see(tokens)
        self.pending = ()

    def decode_entry(self, token: int) -> RowToken:
        """A decode step of this row, begun: its position is taken. For the engine."""
        position = self.next_position
        self._note_fed((token,))
        if self._visual is not None:
            self._visual.begin(np.array([token], np.int64))
        return RowToken(self.row, token, position, self.tokens_seen, self.budget)

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
        self.tokens_seen, self.pending = snapshot.tokens_seen, snapshot.pending
        self.history.words[:] = np.frombuffer(snapshot.history, np.uint32)
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
            videos: in the order of their places in the prompt.
            progress: called after each step with the tokens fed and the tokens in all.

        Raises:
            OptionError: as `step`, or a picture cannot be read; nothing has been fed then.
            EngineError: as `step`.
        """
        self._check_idle()
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
            _check_kind(tokens.tokens)
            if images or videos:
                raise OptionError("the prompt comes with its pictures; give images and videos with plain tokens only")
            return tokens
        _check_kind(tokens)
        if not images and not videos:
            return VisualPrompt(tokens)
        return self._engine.pictures.read(tokens, images or (), videos or ())

    def _feed(
        self, prompt: VisualPrompt, progress: PromptProgress | None, *, whole: bool, new: int = 0
    ) -> NDArray[np.float32]:
        chunk, total = self._engine.config.prefill_chunk, len(prompt.tokens)
        # All of it, before the first step.
        self._check_prompt(prompt.tokens, prompt.pictures, whole=whole, new=new)
        done = 0
        for logits in self._feed_steps(prompt, chunk, whole=whole):  # noqa: B007 (the last is the result)
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

        Raises:
            OptionError: as `step`, for the tokens of each step; before the first, for an empty prompt and for pictures
                that do not fit it.
            EngineError: as `step`.
        """
        self._check_idle()
        yield from self._feed_steps(prompt, self._engine.config.prefill_chunk if chunk is None else chunk, whole=whole)

    def _feed_steps(
        self, prompt: VisualPrompt, chunk: int, *, whole: bool
    ) -> Generator[NDArray[np.float32], None, None]:
        tokens, pictures = prompt.tokens, prompt.pictures
        if not len(tokens):
            raise OptionError("the prompt is empty; give at least one token")
        if pictures:
            self._check_prompt(tokens, pictures, whole=whole)
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
        stop: Sequence[str] = (),
        progress: PromptProgress | None = None,
    ) -> Generator[int, None, None]:
        """Feed `tokens` and yield new ones; a stop token ends the text and is not yielded.

        Nothing is fed before the first token is asked for. A token is fed when the next one is asked for. So the last
        one yielded is not in the cache when `max_new_tokens` ended the text, or the caller did; it is when a stop token
        ended it, for that was chosen after it. `pending` has what is not: go on with
        `session.generate([*session.pending, *tokens], …)`.

        The text is open until its last token was asked for and did not come, or `close()` was called; meanwhile
        nothing else can be fed. Penalties count all turns of the session (`history`).

        Args:
            tokens: the prompt, or the next turn.
            max_new_tokens: at most so many are yielded, and no more than the engine's context has room for.
            sampling: greedy by default. Tokens that stand for pictures are never chosen.
            images, videos: as for `prefill`.
            stop_ids: default: the end-of-text tokens of the package's tokenizer.
            stop: texts; the token that completes one is the last. `Tokenizer.stream(stop=…)` gives the text before it.
            progress: as for `prefill`.

        Raises:
            OptionError: a bad token, picture or option, or a prompt that leaves no room in the context.
            EngineError: the engine fails, or an earlier `generate` is still open.
        """
        max_new_tokens = require_whole("max_new_tokens", max_new_tokens, 1)
        listed = isinstance(stop, Sequence) and not isinstance(stop, str)
        if not listed or not all(isinstance(word, str) and word for word in stop):
            raise OptionError(f"stop must be a list of texts that are not empty, got {shorten(stop)}")
        self._check_valid()
        self._check_idle()
        ends = self._engine.tokenizer.eos_ids if stop_ids is None else stop_ids
        sampler = Sampler(sampling or SamplingOptions(), self.history, ends)
        prompt = self._read(tokens, images, videos)
        texts = self._engine.tokenizer.stream(after=prompt.tokens, stop=stop) if stop else None
        return self._generate(prompt, max_new_tokens, sampler, ends, texts, progress)

    def _generate(
        self,
        prompt: VisualPrompt,
        max_new_tokens: int,
        sampler: Sampler,
        ends: frozenset[int],
        texts: TextStream | None,
        progress: PromptProgress | None,
    ) -> Generator[int, None, None]:
        self._check_idle()
        self._generating = mine = object()
        self.finish_reason = None
        try:
            logits = self._feed(prompt, progress, whole=True, new=1)
            del prompt  # the pixels of its pictures
            never = list(self._engine.config.placeholder_ids)
            left = min(max_new_tokens, self._engine.context - self.next_position)
            while True:
                logits[never] = -np.inf  # a session's own buffer
                token = sampler(logits)
                if token in ends:
                    self.finish_reason = "stop"
                    return
                self.pending = (token,)
                left -= 1
                if texts is not None:
                    texts.push(token)
                stopped = texts is not None and texts.stopped
                if stopped or not left:  # whether or not anybody asks for one more
                    self.finish_reason, self._generating = "stop" if stopped else "length", None
                    yield token
                    return
                yield token
                if self._generating is not mine:
                    raise EngineError("the session was reset or closed before the end of this text; generate it again")
                logits = self._step((token,))
        finally:
            if self._generating is mine:
                self._generating = None

    def kept(self) -> NDArray[np.int32]:
        """Every live cache entry as rows (layer, KV head, position), sorted: [entries, 3]."""
        self._check_open()
        needed = ("counters", "stream_start", "slot_index", "pool_position")
        return kept_entries(self._memory.read(self.row, *needed), self._engine.config.cache)

    def snapshot(self) -> Snapshot:
        """A copy of the session's state, of fixed size, for `Engine.resume`.

        Raises:
            EngineError: an image is not fed to its end.
        """
        self._check_valid()
        if self._visual is not None and not self._visual.empty:
            raise EngineError(
                f"the session has {self._visual.positions.visual_tokens_left} tokens of an image still to come; feed "
                "them before it is saved"
            )
        payload = b"".join(np.ascontiguousarray(array).tobytes() for array in self.state.values())
        return Snapshot(
            self._engine.config.digest,
            self.budget,
            self.tokens_seen,
            self.next_position,
            self.pending,
            self.history.words.tobytes(),
            payload,
        )

    def save(self, path: Path | str) -> None:
        """Write the session to a file of fixed size, for `Engine.restore`.

        Raises:
            OutputError: the file cannot be written.
            EngineError: an image is not fed to its end.
        """
        write_snapshot(Path(path), self.snapshot())


def _check_kind(tokens: Any) -> None:
    """Raise OptionError for what is no list of token ids, such as the text itself."""
    if isinstance(tokens, str | bytes | bytearray) or not isinstance(tokens, Sequence | np.ndarray):
        raise OptionError(f"tokens must be a list of token ids, got {shorten(tokens)}; Tokenizer.encode makes one")
