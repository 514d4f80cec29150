"""Build TensorRT engines from the graphs of a package: for TensorRT, and for TensorRT-RTX.

*Not run here* with TensorRT itself, whose libraries need an NVIDIA GPU; with TensorRT-RTX, which has the same Python
interface and builds without one, every part but the plugin is (tests/unit/build/test_build_tensorrt.py).
"""

import contextlib
import math
import mmap
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from trimkv_export.backends.tensorrt import PLUGIN, create, find_plugin, import_tensorrt, load_plugin, make_log
from trimkv_export.build.tensorrt_llm import installed_version, write_engine_folder
from trimkv_export.config import BuildOptions, EngineWeights, Target
from trimkv_export.errors import EngineError, OptionError, UnsupportedModelError
from trimkv_export.files import emptied, read_regular, require_writable, writable
from trimkv_export.graph.tensorrt import for_tensorrt, standard_operators
from trimkv_export.package import (
    DECODER,
    DECODER_ENGINE,
    VISION,
    VISION_ENGINE,
    EngineInfo,
    PackageConfig,
    parser_file,
)
from trimkv_export.plan import device
from trimkv_export.plan.planner import ModelPlan, window_tokens

__all__ = ["EngineBuilder", "Profile", "decoder_profiles", "vision_profiles"]

# A dynamic dimension of a graph -> smallest, usual and largest value.
Profile = Mapping[str, tuple[int, int, int]]
# (what is being done, steps done, steps in all)
Progress = Callable[[str, int, int], None]

ERRORS_SHOWN = 3


def decoder_profiles(config: PackageConfig, max_batch: int) -> list[Profile]:
    """Prefill: one row, steps of 1 to C tokens, any of them visual. Decode: one token of text in each of the rows."""
    chunk = config.prefill_chunk
    return [
        {"batch": (1, 1, 1), "step": (1, chunk, chunk), "visual": (0, chunk, chunk)},
        {"batch": (1, max_batch, max_batch), "step": (1, 1, 1), "visual": (0, 0, 0)},
    ]


def vision_profiles(config: PackageConfig) -> list[Profile]:
    """One image, or one temporal patch of a video, at a time; of no more tokens than the package is for."""
    vision = config.vision
    if vision is None:
        return []
    merged = vision.spatial_merge_size**2
    most = vision.max_image_tokens * merged
    profile = {"frames": (1, 1, 1), "patches": (merged, most, most)}
    if vision.window_side is not None:
        places = vision.window_side**2 * merged
        windows = math.ceil(window_tokens(vision.max_image_tokens, vision.window_side) * merged / places)
        profile |= {"windows": (1, windows, windows)} | dict.fromkeys(("places", "keys"), (merged, places, places))
    return [profile]


class EngineBuilder:
    """Adds the engines of one target to a package that is being written.

    It is made before the package is begun, so that what is missing is said at once.

    Raises:
        MissingDependencyError: TensorRT is not installed.
        EngineError: the plugin library was not built.
        OptionError: the target cannot build for the device.
    """

    def __init__(self, options: BuildOptions, progress: Progress) -> None:
        self._options, self._progress = options, progress
        self._llm = installed_version() if options.target is Target.TENSORRT_LLM else None
        self._tensorrt = import_tensorrt(options.target)
        # TensorRT-RTX knows no plugins: its parser ends the process over one.
        self._plugin = find_plugin() if options.target is not Target.TENSORRT_RTX else None
        if self._plugin is None and options.target is not Target.TENSORRT_RTX:
            raise EngineError(
                f"the decoder needs the plugin library {PLUGIN}, which was not built; run `make -B plugins CUDA=ON "
                "TENSORRT_INCLUDE_DIR=…` in the source tree (plugins/tensorrt/README.md)"
            )
        self._capability = self._compute_capability() if options.target is Target.TENSORRT_RTX else None

    def check_model(self, model_type: str, *, has_tower: bool) -> None:
        """Raise UnsupportedModelError if there is nothing in the model that the target can run."""
        if self._options.target is Target.TENSORRT_RTX and not has_tower:
            raise UnsupportedModelError(
                f"{self._options.model}: TensorRT-RTX cannot run the decoder, which needs plugins for its cache; it "
                f"can run a vision tower, and {model_type} has none. Use --target tensorrt or --target onnxruntime"
            )

    def add(self, stage: Path, config: PackageConfig, fitted: ModelPlan | None) -> PackageConfig:
        """Build the engines of the package in `stage`, next to its graphs.

        Args:
            stage: the folder.
            config: the package's config.
            fitted: the plan of the device, from which TensorRT gets the memory that it may work in.

        Returns:
            The config with the engines.

        Raises:
            EngineError: TensorRT, which is quoted, does not take a graph, or cannot build an engine.
        """
        free = _free_bytes(fitted, config)
        if self._plugin is not None:
            shutil.copyfile(self._plugin, emptied(stage / PLUGIN))
            profiles = decoder_profiles(config, self._options.max_batch)
            self.build(stage / DECODER, stage / DECODER_ENGINE, profiles, free.get(DECODER))
            if self._llm is not None:
                write_engine_folder(stage, config, self._llm, self._options.max_batch)
        if config.vision is not None:
            self.build(stage / VISION, stage / VISION_ENGINE, vision_profiles(config), free.get(VISION))
        version = str(self._tensorrt.__version__)
        engine = EngineInfo(version, self._options.max_batch, self._options.engine_weights)
        return replace(config, engine=engine)

    def build(self, graph: Path, engine: Path, profiles: Sequence[Profile], workspace: int | None = None) -> None:
        """Build one engine, and write it, what its layers are (JSON), and the graph as the parser got it.

        Args:
            graph: the package's graph.
            engine: the file to write.
            profiles: of the engine.
            workspace: bytes that a layer may work in; None leaves all of the device to it.

        Raises:
            EngineError: as `add`.
        """
        trt = self._tensorrt
        log = make_log(trt)
        builder = create(lambda: trt.Builder(log), log, "a builder")
        if self._plugin is not None:
            load_plugin(builder.get_plugin_registry(), self._plugin, log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        model = self._parse(network, graph, log)
        config = builder.create_builder_config()
        for profile in profiles:
            config.add_optimization_profile(_optimization_profile(builder, model, profile))
        self._configure(config, workspace)
        with self._timing_cache(config), _monitored(trt, config, engine.name, self._progress):
            plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise EngineError(f"{graph.name}: TensorRT cannot build an engine from it: {log.said()}")
        emptied(engine).write_bytes(plan)
        del plan, network, builder
        layers = self._layers(engine)
        if layers is not None:
            emptied(engine.with_name(f"{engine.name}.json")).write_text(layers, encoding="utf-8")

    def _parse(self, network: Any, graph: Path, log: Any) -> onnx.ModelProto:
        """Fill the network; returns the model that the parser got."""
        parser = self._tensorrt.OnnxParser(network, log)
        try:
            model = onnx.load(str(graph), load_external_data=False)
        except (OSError, DecodeError) as error:
            raise EngineError(
                f"{graph.name} cannot be read as an ONNX graph ({error}); build the package again"
            ) from None
        unsupported = {name for name in standard_operators(model) if not parser.supports_operator(name)}
        model = for_tensorrt(model, unsupported)
        given = parser_file(graph)
        emptied(given).write_bytes(model.SerializeToString(deterministic=True))
        if not parser.parse_from_file(str(given)):
            raise EngineError(f"{graph.name}: TensorRT's parser refuses it: {_parser_errors(parser) or log.said()}")
        return model

    def _configure(self, config: Any, workspace: int | None) -> None:
        trt, weights = self._tensorrt, self._options.engine_weights
        config.clear_flag(trt.BuilderFlag.TF32)  # fp32 is asked for where its rounding is wanted
        if weights is EngineWeights.STRIPPED:
            config.set_flag(trt.BuilderFlag.STRIP_PLAN)
            config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
        elif weights is EngineWeights.STREAMED:
            config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
        if self._capability is not None:
            config.num_compute_capabilities = 1
            config.set_compute_capability(self._capability, 0)

    def _compute_capability(self) -> Any:
        """What TensorRT-RTX is to compile for; None leaves it to it (all that it knows)."""
        if self._options.device is None:
            return None
        profile, known = device(self._options.device), self._tensorrt.ComputeCapability.__members__
        if profile.compute_capability is None:
            return None
        name = f"SM{profile.compute_capability.replace('.', '')}"
        if name not in known:
            raise OptionError(
                f"TensorRT-RTX {self._tensorrt.__version__} does not build for {profile.name} (compute capability "
                f"{profile.compute_capability}); it builds for {', '.join(n for n in known if n.startswith('SM'))}; "
                "use --target tensorrt"
            )
        return known[name]

    @contextlib.contextmanager
    def _timing_cache(self, config: Any) -> Iterator[None]:
        """Let the builder use, and then write, what it measured before."""
        file = self._options.timing_cache
        if file is None:
            yield
            return
        require_writable(file)
        try:
            known = read_regular(file) if file.exists() else b""
        except OSError as error:
            raise OptionError(f"timing-cache {file}: cannot be read: {error.strerror or error}") from None
        cache = config.create_timing_cache(known)
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            raise OptionError(
                f"timing-cache {file} is not a timing cache, or is of another device or TensorRT; name another file"
            )
        yield
        with writable(file, "the timing cache cannot be written") as out:
            out.write(config.get_timing_cache().serialize())

    def _layers(self, engine: Path) -> str | None:
        """What the engine's layers are, as TensorRT's JSON; None where TensorRT-RTX has no GPU to load it on."""
        trt = self._tensorrt
        log = make_log(trt)
        runtime = create(lambda: trt.Runtime(log), log, "a runtime")
        if self._plugin is not None:
            load_plugin(runtime.get_plugin_registry(), self._plugin, log)
        with engine.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            loaded = runtime.deserialize_cuda_engine(content)
        if loaded is None:
            if self._options.target is Target.TENSORRT_RTX:
                return None
            raise EngineError(f"{engine.name}: TensorRT cannot load the engine that it built: {log.said()}")
        return str(loaded.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def _free_bytes(fitted: ModelPlan | None, config: PackageConfig) -> dict[str, int]:
    """What the plan leaves for a graph's layers to work in: its activations and what is left over, by graph."""
    if fitted is None or fitted.plan.headroom_bytes is None:
        return {}
    plan, headroom = fitted.plan, fitted.plan.headroom_bytes
    tower = plan.vision_bytes - (config.vision.weight_bytes if config.vision else 0)
    return {DECODER: headroom + plan.activation_bytes, VISION: headroom + tower}


def _optimization_profile(builder: Any, model: onnx.ModelProto, profile: Profile) -> Any:
    """The profile with the shapes of all inputs that are not fixed."""
    made = builder.create_optimization_profile()
    for tensor in model.graph.input:
        dims = tensor.type.tensor_type.shape.dim
        if any(dim.dim_param for dim in dims):
            shapes = [
                tuple(profile[dim.dim_param][kind] if dim.dim_param else dim.dim_value for dim in dims)
                for kind in range(3)
            ]
            made.set_shape(tensor.name, *shapes)
    return made


def _parser_errors(parser: Any) -> str:
    """What the parser has against a graph, the first errors in one line."""
    found = []
    for index in range(min(parser.num_errors, ERRORS_SHOWN)):
        error = parser.get_error(index)
        node = f"node {error.node_name()!r} ({error.node_operator()}): " if error.node_name() else ""
        found.append(f"{node}{error.desc().strip()} [{error.code().name}]")
    more = parser.num_errors - len(found)
    return "; ".join(found) + (f"; and {more} more" if more > 0 else "")


@contextlib.contextmanager
def _monitored(tensorrt: Any, config: Any, what: str, progress: Progress) -> Iterator[None]:
    """Report the builder's phases, and end it at Ctrl-C or SIGTERM: no exception can pass through TensorRT."""

    class Monitor(tensorrt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            tensorrt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.stopped_by: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:  # noqa: ARG002
            self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if self.stopped_by is None:
                try:
                    progress(f"{what}: {phase_name}", step + 1, self.steps.get(phase_name, step + 1))
                except Exception as error:
                    self.stopped_by = error
            return self.stopped_by is None

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    monitor = Monitor()
    config.progress_monitor = monitor

    heard = []

    def interrupt(number: int, _frame: object) -> None:
        heard.append(number)
        monitor.stopped_by = KeyboardInterrupt()

    before = {}
    if threading.current_thread() is threading.main_thread():
        before[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
        if callable(signal.getsignal(signal.SIGTERM)):  # else it ends the process, as whoever started it wants
            before[signal.SIGTERM] = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        config.progress_monitor = None
    if signal.SIGTERM in heard:
        signal.raise_signal(signal.SIGTERM)  # what the handler raises says which of the two it was
    if monitor.stopped_by is not None:
        raise monitor.stopped_by
