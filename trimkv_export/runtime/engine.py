"""An opened package: the ONNX Runtime session and the one allocation that holds the cache."""

import contextlib
import functools
import gc
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimkv_export.backends.native import QUANTIZED_LINEAR_ENTRY, built_with_cuda, find_library, serves_quantized
from trimkv_export.backends.onnxruntime import import_onnxruntime
from trimkv_export.backends.threads import step_threads
from trimkv_export.checks import require_whole
from trimkv_export.compat import Self
from trimkv_export.config import MAX_IMAGE_PIXELS, MOST_IMAGE_PIXELS, Precision, Target
from trimkv_export.errors import EngineError, OptionError, PackageError
from trimkv_export.package import DECODER, VISION, Package, VisionInfo
from trimkv_export.plan.host import available_memory
from trimkv_export.policy import Slab, plan_slab
from trimkv_export.runtime import heap
from trimkv_export.runtime.batch import DecodeBatch
from trimkv_export.runtime.cache_memory import CacheMemory, DeviceMemory, HostMemory
from trimkv_export.runtime.decode_graph import DecodeGraph, DecodeGraphs
from trimkv_export.runtime.session import MAX_TOKENS, Session
from trimkv_export.runtime.snapshot import Snapshot, check_package, read_snapshot
from trimkv_export.runtime.tensorrt import open_rtx_tower, open_tensorrt
from trimkv_export.runtime.vision_tower import VisionTower
from trimkv_export.text.tokenizer import Tokenizer
from trimkv_export.vision.reader import PictureReader
from trimkv_export.words import amount, first_line, shorten

__all__ = ["Engine"]

NATIVE_MODES = ("auto", "require", "off")
TENSORRT = "tensorrt"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# What ONNX Runtime says of a model that it cannot capture: "This session cannot use the graph capture feature as …".
CAPTURE_REFUSED = re.compile(r"cannot use the .*graph", re.IGNORECASE)


class Engine:
    """Runs a package. Open it with `Engine.open`; it is a context manager. Not safe for use by several threads at once.

    Attributes:
        config: the package's config.
        cache_bytes: bytes of the cache slab, all rows; allocated once, at opening.
        context: the most positions of a conversation: its tokens, or with M-RoPE less, as an image takes few.
        threads: threads of a step on the CPU.
        native: whether native kernels are in use; False means the portable bodies.
        graphs: decode steps as CUDA graphs; None where they were not asked for.
        vision: the vision tower; None where the package has none, or it was not opened.
    """

    def __init__(
        self,
        package: Package,
        backend: Any,
        memory: CacheMemory,
        slab: Slab,
        *,
        native: bool,
        threads: int,
        context: int | None = None,
        graphs: DecodeGraphs | None = None,
        vision: VisionTower | None = None,
        max_image_pixels: int | None = None,
    ) -> None:
        self.package, self.config = package, package.config
        self.backend, self.memory, self.slab = backend, memory, slab
        self.native, self.graphs, self.vision = native, graphs, vision
        self.threads = threads
        planned = MAX_IMAGE_PIXELS if self.config.vision is None else self.config.vision.max_image_pixels
        self.max_image_pixels = planned if max_image_pixels is None else max_image_pixels
        self.context = self.config.model.max_position_embeddings if context is None else context
        self.cache_bytes = slab.nbytes
        rows = slab.entries[0].shape[0]
        self._free_rows = list(range(rows))[::-1]
        batched = native and rows > 1 and graphs is None
        self._batch = DecodeBatch(backend, memory, slab, self.config) if batched else None

    @classmethod
    def open(
        cls,
        path: Path | str,
        provider: str = "cpu",
        native: str = "auto",
        *,
        max_sessions: int = 1,
        threads: int | None = None,
        context: int | None = None,
        cuda_graph: bool = False,
        vision: bool = True,
        max_image_pixels: int | None = None,
        trust_package_plugin: bool = False,
    ) -> Self:
        """Open a package for up to `max_sessions` conversations at a time.

        Args:
            path: the package folder.
            provider: "cpu"; "cuda" (onnxruntime-gpu and native kernels built with CUDA), which runs the vision tower of
                a package built for TensorRT-RTX there; or "tensorrt", of a package built for it.
            native: "auto" takes native kernels where they are installed, "require" insists, "off" never does.
            max_sessions: rows of the cache slab.
            threads: threads of one step, 1 to 1,024; None takes as many as the process may keep busy: the smaller of
                the processors that it may run on and its control groups' quota.
            context: the most positions of a conversation; None is what the model was made for, beyond which its answers
                are worth little. The cache has one size whatever it is.
            cuda_graph: with the CUDA provider, launch each decode step as one captured graph, as TensorRT always does.
                Results are the same. Decoding is then bound to the thread that opens the engine.
            vision: False does not load the package's vision tower, if it has one; the engine then takes text only.
                Loading it changes settings of the process's malloc (runtime/heap.py).
            max_image_pixels: the most pixels of an image as it is in its file, and four times those of a video's frame;
                a larger one is refused by its header, before it is decoded. None: what the package was planned for.
            trust_package_plugin: with "tensorrt", where no plugin library is installed here, load the package's own:
                native code, that whoever made the package chose.

        Raises:
            OptionError: a bad argument.
            PackageError: not a package, or changed since it was built.
            EngineError: this machine cannot run it as asked.
            MissingDependencyError: onnxruntime is not installed.
        """
        if provider not in (*PROVIDERS, TENSORRT):
            raise OptionError(f"provider must be one of {', '.join(PROVIDERS)}, {TENSORRT}, got {shorten(provider)}")
        if native not in NATIVE_MODES:
            raise OptionError(f"native must be one of {', '.join(NATIVE_MODES)}, got {shorten(native)}")
        max_sessions = require_whole("max_sessions", max_sessions, 1)
        threads = step_threads(threads)
        context = None if context is None else require_whole("context", context, 1, MAX_TOKENS)
        if max_image_pixels is not None:
            max_image_pixels = require_whole("max_image_pixels", max_image_pixels, 1, MOST_IMAGE_PIXELS)
        for name, flag in (("cuda_graph", cuda_graph), ("trust_package_plugin", trust_package_plugin)):
            if not isinstance(flag, bool):
                raise OptionError(f"{name} must be True or False, got {shorten(flag)}")
        if cuda_graph and provider != "cuda":
            raise OptionError(
                f"cuda_graph=True needs provider='cuda', got provider={provider!r}; leave cuda_graph out, or open the "
                "package with provider='cuda'"
            )
        if provider == TENSORRT:
            if native == "off":
                raise OptionError("native='off' is not for provider='tensorrt', whose engine has no portable bodies")
            package = Package.open(path)
            opened = open_tensorrt(package, max_sessions, vision=vision, trust_package_plugin=trust_package_plugin)
            return cls(
                package, opened.backend, opened.memory, opened.slab,
                native=True, threads=threads, context=context, graphs=opened.graphs, vision=opened.vision,
                max_image_pixels=max_image_pixels,
            )  # fmt: skip
        library = None if native == "off" else find_library()
        if library is None and (native == "require" or provider != "cpu"):
            raise EngineError(
                f"native kernels are required{' by the CUDA provider' if provider != 'cpu' else ''}, and they were not "
                "built; run `make plugins` in the source tree, or reinstall with ONNX Runtime's headers at hand "
                "(plugins/README.md)"
            )
        if provider == "cuda" and not built_with_cuda(library):
            raise EngineError(f"{library} was built without CUDA; build it with `make plugins CUDA=ON`")
        package = Package.open(path)
        if package.config.precision is Precision.BF16 and provider == "cpu":
            raise EngineError(
                f"{path}: a bf16 package does not run on ONNX Runtime's CPU provider, which lacks bfloat16 arithmetic; "
                "build with --precision fp32"
            )
        runtime = import_onnxruntime()
        found = runtime.get_available_providers()
        if PROVIDERS[provider] not in found:
            raise EngineError(
                f"this onnxruntime has no {PROVIDERS[provider]} (it has {', '.join(found)}); install onnxruntime-gpu "
                "in its place"
            )
        backend = _open_decoder(runtime, package, PROVIDERS[provider], threads, library, cuda_graph=cuda_graph)
        tower: VisionTower | None = None
        if vision and provider == "cuda" and package.config.target == Target.TENSORRT_RTX:
            tower = open_rtx_tower(package)
        elif vision and package.config.vision is not None:
            options = _session_options(runtime, threads)
            # Its activations are large and needed once an image: they go back to the system after each.
            options.enable_cpu_mem_arena = False
            tower_backend = _open_graph(runtime, package, VISION, options, PROVIDERS[provider])
            tower = VisionTower(tower_backend, package.config, package.config.vision)
            heap.keep_border(package.config.model.vocab_size)
        slab = plan_slab(package.config.cache, max_sessions)
        memory = _allocate(runtime, slab, max_sessions, provider)
        graphs = None
        if cuda_graph:
            graphs = DecodeGraphs(runtime, backend, memory, slab, package.config)
        return cls(
            package, backend, memory, slab,
            native=library is not None, threads=threads, context=context, graphs=graphs, vision=tower,
            max_image_pixels=max_image_pixels,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the engine; its sessions cannot be used any more. The cache is freed with the last of them."""
        self.backend = self.graphs = self.vision = None

    @functools.cached_property
    def pictures(self) -> PictureReader:
        """What reads images and videos for the package's model.

        Raises:
            EngineError: it has no vision tower.
            PackageError: its preprocessor's configuration is corrupt.
        """
        return PictureReader(
            self.package.path,
            self.vision_info,
            self.tokenizer,
            listed=self.config.files,
            max_pixels=self.max_image_pixels,
        )

    @property
    def vision_info(self) -> VisionInfo:
        """The package's vision tower.

        Raises:
            EngineError: it has none.
        """
        if self.config.vision is None:
            raise EngineError(f"{self.package.path}: this package has no vision tower and takes no images")
        return self.config.vision

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The package's tokenizer.

        Raises:
            PackageError: it has none.
        """
        return self.package.open_tokenizer()

    def session(self, budget: int | None = None) -> Session:
        """Start a conversation with an empty cache.

        Args:
            budget: kept entries per stream on average, at most what the package was built for (the default).

        Raises:
            OptionError: a budget outside that range.
            EngineError: all rows are in use.
        """
        eviction = self.config.eviction
        budget = eviction.budget if budget is None else budget
        lowest = max(1, eviction.min_tokens_per_head)
        budget = require_whole("budget", budget, lowest, eviction.budget, ", what the package was built for")
        if self.backend is None:
            raise EngineError("this engine was closed; open the package again")
        if not self._free_rows:
            gc.collect()  # sessions that only a circle of references still holds
        if not self._free_rows:
            raise EngineError(
                f"all {self.slab.entries[0].shape[0]} cache rows are in use; close a session, or open the engine with "
                "a larger max_sessions. A session is in use as long as a variable holds it, also while that variable "
                "is assigned a new one"
            )
        row = self._free_rows.pop()
        try:
            return Session(self, row, budget)
        except BaseException:
            self.release_row(row)
            raise

    def restore(self, path: Path | str) -> Session:
        """Start a session from a file that `Session.save` wrote; it goes on exactly where that one was.

        Raises:
            PackageError: the file is damaged, or of another package.
            EngineError: all rows are in use.
        """
        return self._resume(read_snapshot(Path(path), self.config))

    def resume(self, snapshot: Snapshot) -> Session:
        """Start a session from what `Session.snapshot` of this package gave.

        Raises:
            PackageError: it is of another package.
            EngineError: all rows are in use.
        """
        check_package(snapshot, self.config, "this snapshot")
        return self._resume(snapshot)

    def _resume(self, snapshot: Snapshot) -> Session:
        session = self.session(snapshot.budget)
        try:
            session.load(snapshot)
        except BaseException:
            session.close()
            raise
        return session

    def step_many(self, work: Sequence[tuple[Session, Sequence[int]]]) -> list[NDArray[np.float32]]:
        """One step of several sessions, of any mix of lengths -> logits [V] of each (copies).

        With native kernels all sessions that feed one token go through the model together; longer parts, and the
        portable bodies, take their turn. Each session's result is that of `Session.step` alone, to rounding.

        Raises:
            TrimKVError: as `Session.step`, before any session has moved.
        """
        if len({id(session) for session, _ in work}) != len(work):
            raise OptionError("step_many got one session twice; put its tokens into one entry")
        for session, tokens in work:
            session.check_tokens(tokens)
        decoding = [(session, tokens[0]) for session, tokens in work if session.is_decode(tokens)]
        batch: DecodeBatch | DecodeGraph | None = None
        if len(decoding) > 1:
            batch = self.graphs.of([session.row for session, _ in decoding]) if self.graphs else self._batch
        if batch is None:
            return [session.step(tokens) for session, tokens in work]
        logits = {}
        with contextlib.ExitStack() as stack:
            for session, _ in decoding:
                stack.enter_context(session.stepping(1))
            rows = batch.step([session.decode_entry(token) for session, token in decoding])
            for session, _ in decoding:
                logits[id(session)] = rows[session.row].copy()
        return [logits[id(s)] if id(s) in logits else s.step(tokens) for s, tokens in work]

    def run(self, binding: Any) -> None:
        """Run a step that is not a captured one. For sessions."""
        if self.graphs is None:
            self.backend.run_with_iobinding(binding)
        else:
            self.backend.run_with_iobinding(binding, self.graphs.ordinary)

    def release_row(self, row: int) -> None:
        """Make a row free for the next session."""
        self._free_rows.append(row)


def _allocate(runtime: Any, slab: Slab, rows: int, provider: str) -> CacheMemory:
    """The cache of `rows` rows. Raises EngineError where it cannot be had."""
    said = "open with fewer max_sessions, or build with a smaller --budget"
    if provider == "cpu":
        left = None
        with contextlib.suppress(OptionError):  # a system that does not say
            left = available_memory()
        # The kernel promises more memory than there is, and kills a process that takes it at its word.
        if left is not None and slab.nbytes > left:
            raise EngineError(
                f"the cache of {rows:,} rows takes {amount(slab.nbytes)}, and {amount(left)} are available; {said}"
            )
    try:
        return HostMemory(slab) if provider == "cpu" else DeviceMemory(slab, provider, runtime)
    # What mmap and NumPy raise, and for a device ONNX Runtime.
    except (MemoryError, OSError, ValueError, OverflowError, RuntimeError) as error:
        raise EngineError(
            f"the cache of {rows:,} rows takes {amount(slab.nbytes)} and cannot be allocated ({first_line(error)}); "
            + said
        ) from None


def _session_options(onnxruntime: Any, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Inner shapes change from step to step (heads keep different amounts), so a pattern of one step misleads the next.
    options.enable_mem_pattern = False
    options.intra_op_num_threads = threads
    return options


def _open_decoder(
    onnxruntime: Any, package: Package, provider: str, threads: int, library: Path | None, *, cuda_graph: bool
) -> Any:
    options = _session_options(onnxruntime, threads)
    if library is not None:
        if provider == PROVIDERS["cpu"] and serves_quantized(package.config.quantization, package.config.precision):
            options.add_session_config_entry(QUANTIZED_LINEAR_ENTRY, "1")
        try:
            options.register_custom_ops_library(str(library))
        except Exception as error:
            raise EngineError(
                f"the native kernels cannot be loaded: {first_line(error)}; build them again (make plugins), or use "
                "native='off'"
            ) from None
    return _open_graph(onnxruntime, package, DECODER, options, provider, cuda_graph=cuda_graph)


def _open_graph(
    onnxruntime: Any, package: Package, file: str, options: Any, provider: str, *, cuda_graph: bool = False
) -> Any:
    # By default fp32 products are rounded to TF32 (10 bits), and logits would be off by more than `verify` allows.
    settings = {"use_tf32": "0", "enable_cuda_graph": str(int(cuda_graph))} if provider == PROVIDERS["cuda"] else {}
    try:
        session = onnxruntime.InferenceSession(str(package.file(file)), options, providers=[(provider, settings)])
    except Exception as error:  # onnxruntime raises its own types, some derived from RuntimeError only
        if cuda_graph and CAPTURE_REFUSED.search(str(error)):
            raise EngineError(
                f"{package.path}: {file} cannot be captured in a CUDA graph, because not all of it runs on the GPU: "
                f"{first_line(error)}; open the package without cuda_graph"
            ) from None
        raise EngineError(f"{package.path}: ONNX Runtime cannot load {file}: {first_line(error)}") from None
    if provider not in session.get_providers():  # its libraries do not load; ONNX Runtime goes on without a word here
        raise EngineError(
            f"{package.path}: ONNX Runtime fell back from {provider} to {', '.join(session.get_providers())}; see that "
            "the CUDA and cuDNN libraries that onnxruntime-gpu needs are installed"
        )
    found = session.get_modelmeta().custom_metadata_map
    for name, value in package.config.graph_metadata().items():
        if found.get(name) != value:
            raise PackageError(
                f"{package.path}: config.json says {name} = {value}, {file} says {found.get(name)}; they are of "
                "different builds, build the package again"
            )
    return session
