"""The TensorRT backend: a package's engines behind what sessions call of ONNX Runtime (`run_with_iobinding`).

Everything is allocated when the package is opened: the cache, as one block; inputs and outputs at their largest; one
block that all execution contexts work in, one after the other; and a CUDA graph, with a context of its own, for each
range of rows that decode together. A step copies its inputs, runs, copies the logits, and waits once: for them.

*Not run here* in TensorRT or on a GPU: tests run it on stand-ins of both (tests/fake_tensorrt.py).
"""

import ctypes
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimkv_export.backends.cuda import Cuda, DeviceArray, import_cuda
from trimkv_export.backends.tensorrt import PLUGIN, create, find_plugin, import_tensorrt, load_plugin, make_log
from trimkv_export.config import EngineWeights, Target
from trimkv_export.errors import EngineError, OptionError
from trimkv_export.package import (
    DECODER,
    DECODER_ENGINE,
    VISION,
    VISION_ENGINE,
    EngineInfo,
    Package,
    PackageConfig,
    VisionInfo,
    parser_file,
)
from trimkv_export.policy import Slab, plan_slab
from trimkv_export.runtime.cache_memory import BFLOAT16, SMALL, numpy_dtype
from trimkv_export.runtime.decode_graph import GRAPH_ID, NO_GRAPH, DecodeGraphs
from trimkv_export.runtime.vision_tower import VisionTower
from trimkv_export.vision.positions import Grid

__all__ = ["Opened", "SlabMemory", "TensorRTBackend", "open_rtx_tower", "open_tensorrt"]

PREFILL, DECODE = 0, 1  # profiles, as build/tensorrt.py makes them
STATE = "past."
ITEM_BYTES = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT32": 4, "INT64": 8, "BOOL": 1}


@dataclass(frozen=True)
class Opened:
    """What an `Engine` is made of."""

    backend: "TensorRTBackend"
    memory: "SlabMemory"
    slab: Slab
    graphs: DecodeGraphs
    vision: VisionTower | None


def open_tensorrt(package: Package, rows: int, *, vision: bool, trust_package_plugin: bool) -> Opened:
    """Load a package's engines and allocate everything, for `rows` rows.

    The plugins are those of this installation. `trust_package_plugin`: without them, those of the package, which is
    native code that whoever made it chose.

    Raises:
        EngineError: the package has no engine, or TensorRT or CUDA, which is quoted, fails.
        OptionError: the engine takes fewer rows.
        MissingDependencyError: TensorRT or CUDA's Python packages are not installed.
    """
    config, info = package.config, package.config.engine
    if info is None or DECODER_ENGINE not in config.files:
        raise EngineError(
            f"{package.path}: this package has no TensorRT engine of the decoder; build it on this machine with "
            "--target tensorrt"
        )
    if rows > info.max_batch:
        raise OptionError(
            f"max_sessions must be at most {info.max_batch}, what the engine was built for, got {rows}; build with "
            f"--max-batch {rows}"
        )
    tensorrt, cuda = import_tensorrt(Target.TENSORRT), Cuda(import_cuda())
    slab = plan_slab(config.cache, rows)
    memory = SlabMemory(slab, cuda)
    decoder = TensorRTBackend(
        _load(tensorrt, package, DECODER, DECODER_ENGINE, info, _plugin(package, trust=trust_package_plugin)),
        cuda,
        _logits_bytes(config, rows),
    )
    backends, tower = [decoder], None
    if vision and config.vision is not None:
        backend = TensorRTBackend(
            _load(tensorrt, package, VISION, VISION_ENGINE, info), cuda, _features_bytes(config, config.vision)
        )
        backends.append(backend)
        tower = _FrameByFrame(backend, config, config.vision)
    nbytes = max(backend.scratch_bytes for backend in backends)
    scratch = cuda.allocate(nbytes, "what the engines work in")
    for backend in backends:
        backend.start(scratch, nbytes)
    graphs = DecodeGraphs(_Values(cuda), decoder, memory, slab, config)
    graphs.capture_all()
    cuda.wait()
    return Opened(decoder, memory, slab, graphs, tower)


def open_rtx_tower(package: Package) -> VisionTower:
    """The vision tower's engine of a package built for TensorRT-RTX.

    Raises:
        TrimKVError: as `open_tensorrt`.
    """
    info, vision = package.config.engine, package.config.vision
    if info is None or vision is None:
        raise EngineError(
            f"{package.path}: this package has no TensorRT-RTX engine; build it with --target tensorrt-rtx"
        )
    cuda = Cuda(import_cuda())
    loaded = _load(import_tensorrt(Target.TENSORRT_RTX), package, VISION, VISION_ENGINE, info)
    backend = TensorRTBackend(loaded, cuda, _features_bytes(package.config, vision))
    backend.start(cuda.allocate(backend.scratch_bytes, "what the vision tower works in"), backend.scratch_bytes)
    return _FrameByFrame(backend, package.config, vision)


def _plugin(package: Package, *, trust: bool) -> Path:
    installed = find_plugin()
    if installed is not None:
        return installed
    if not trust:
        raise EngineError(
            f"{package.path}: the decoder needs the plugin library {PLUGIN}, and none is installed here; build it "
            "(make -B plugins CUDA=ON TENSORRT_INCLUDE_DIR=…), or load the package's own with --trust-package-plugin "
            "(trust_package_plugin=True) if you trust whoever made the package: it is native code"
        )
    return package.file(PLUGIN)


def _load(
    tensorrt: Any, package: Package, graph: str, file: str, info: EngineInfo, plugin: Path | None = None
) -> "_Loaded":
    """Load an engine of the package, and its weights where it has none."""
    log = make_log(tensorrt)
    runtime = create(lambda: tensorrt.Runtime(log), log, "a runtime")
    if plugin is not None:
        load_plugin(runtime.get_plugin_registry(), plugin, log)
    with package.file(file).open("rb") as content, mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(
            f"{package.path}: TensorRT {tensorrt.__version__} cannot load {file}: {log.said()}. It was built by "
            f"{info.version}, and an engine runs only on the kind of GPU, and with the TensorRT, that it was built "
            "with: build the package again on this machine"
        )
    if info.weights is EngineWeights.STRIPPED:
        _refit(tensorrt, engine, package.file(parser_file(Path(graph)).name), log)
    elif info.weights is EngineWeights.STREAMED:
        needed = _scratch_bytes(engine)
        engine.weight_streaming_budget_v2 = max(0, engine.get_weight_streaming_automatic_budget() - needed)
    return _Loaded(tensorrt, runtime, engine, log)


def _refit(tensorrt: Any, engine: Any, graph: Path, log: Any) -> None:
    refitter = create(lambda: tensorrt.Refitter(engine, log), log, "a refitter")
    parser = create(lambda: tensorrt.OnnxParserRefitter(refitter, log), log, "a refitter's parser")
    if not parser.refit_from_file(str(graph)) or not refitter.refit_cuda_engine():
        raise EngineError(f"{graph}: TensorRT cannot take the engine's weights from it: {log.said()}")


@dataclass(frozen=True)
class _Loaded:
    tensorrt: Any
    runtime: Any  # the plugins are registered as long as it is there
    engine: Any
    log: Any


def _scratch_bytes(engine: Any) -> int:
    return max(int(engine.get_device_memory_size_for_profile_v2(p)) for p in range(engine.num_optimization_profiles))


def _logits_bytes(config: PackageConfig, rows: int) -> dict[str, int]:
    return {"logits": 4 * rows * config.model.vocab_size}


def _features_bytes(config: PackageConfig, info: VisionInfo) -> dict[str, int]:
    features = info.max_image_tokens * config.model.hidden_size * config.precision.itemsize
    return {"visual_embeds": features, "deepstack_embeds": config.model.deepstack_layers * features}


class _FrameByFrame(VisionTower):
    """The engine takes one temporal patch at a time."""

    def frames_at_once(self, grid: Grid) -> int:  # noqa: ARG002
        """See VisionTower."""
        return 1


@dataclass(frozen=True)
class _Place:
    """Where a tensor is: on the host at `address`, or on the device."""

    on_host: bool
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    address: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Binding:
    """As ONNX Runtime's IOBinding. Host arrays are read, and written, by each run."""

    inputs: dict[str, _Place] = field(default_factory=dict)
    outputs: dict[str, _Place] = field(default_factory=dict)

    def bind_input(self, name: str, device: str, _: int, kind: Any, shape: Sequence[int], address: int) -> None:
        self.inputs[name] = _place(device, kind, shape, address)

    def bind_output(self, name: str, device: str, _: int, kind: Any, shape: Sequence[int], address: int) -> None:
        self.outputs[name] = _place(device, kind, shape, address)

    def bind_ortvalue_input(self, name: str, value: DeviceArray) -> None:
        self.inputs[name] = _Place(False, value.dtype, value.shape, value.address)

    def bind_ortvalue_output(self, name: str, value: DeviceArray) -> None:
        self.outputs[name] = _Place(False, value.dtype, value.shape, value.address)


def _place(device: str, kind: Any, shape: Sequence[int], address: int) -> _Place:
    dtype = np.dtype(np.uint16) if kind == BFLOAT16 else np.dtype(kind)
    return _Place(device == "cpu", dtype, tuple(int(size) for size in shape), address)


def _input_bytes(loaded: _Loaded) -> dict[str, int]:
    """Bytes of each input but the state, at its largest."""
    engine, sizes = loaded.engine, {}
    for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
        is_input = engine.get_tensor_mode(name) == loaded.tensorrt.TensorIOMode.INPUT
        if is_input and not name.startswith(STATE):
            itemsize = ITEM_BYTES[engine.get_tensor_dtype(name).name]
            shapes = [engine.get_tensor_profile_shape(name, p)[-1] for p in range(engine.num_optimization_profiles)]
            sizes[name] = itemsize * max(prod(shape) for shape in shapes)
    return sizes


class TensorRTBackend:
    """An engine: bindings of its tensors, and runs of them. Not safe for use by several threads at once.

    Attributes:
        scratch_bytes: what its execution contexts work in, one at a time.
    """

    def __init__(self, loaded: _Loaded, cuda: Cuda, outputs: Mapping[str, int]) -> None:
        """Allocate inputs and outputs.

        Args:
            loaded: the engine.
            cuda: the device.
            outputs: bytes of those that are bound on the host, at their largest.
        """
        self._loaded, self._cuda = loaded, cuda
        self._arrays = {
            name: DeviceArray(cuda, (nbytes,), np.dtype(np.uint8), f"the tensor {name}")
            for name, nbytes in {**_input_bytes(loaded), **outputs}.items()
        }
        self.scratch_bytes = _scratch_bytes(loaded.engine)
        self._scratch = 0, 0
        self._contexts: list[Any] = []
        self._captured: list[Any] = []  # contexts, which must be there as long as their graphs
        self._graphs: dict[int, Any] = {}

    def start(self, scratch: int, nbytes: int) -> None:
        """Make an execution context for each profile, to work in `nbytes` bytes at the address `scratch`."""
        self._scratch = scratch, nbytes
        self._contexts = [self._context(p) for p in range(self._loaded.engine.num_optimization_profiles)]
        self._cuda.wait()

    def _context(self, profile: int) -> Any:
        strategy = self._loaded.tensorrt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._loaded.engine.create_execution_context(strategy)
        if context is None:
            raise EngineError(f"TensorRT cannot make an execution context: {self._loaded.log.said()}")
        context.set_device_memory(*self._scratch)
        self._check(context.set_optimization_profile_async(profile, int(self._cuda.stream)), f"profile {profile}")
        return context

    def _check(self, done: bool, what: str) -> None:
        if not done:
            raise EngineError(f"TensorRT refuses {what}: {self._loaded.log.said()}")

    def io_binding(self) -> _Binding:
        """A binding, empty."""
        return _Binding()

    def run_with_iobinding(self, binding: _Binding, options: "_RunOptions | None" = None) -> None:
        """Run what is bound; or, with the number of a graph, launch that, which is captured at its first run.

        A run that has outputs on the host has written them when this returns; else it is on its way.

        Raises:
            EngineError: TensorRT or CUDA, which is quoted, fails.
        """
        self._loaded.log.errors.clear()
        graph = NO_GRAPH if options is None else options.graph
        if graph == NO_GRAPH:
            self._run(binding)
            return
        if graph not in self._graphs:
            self._capture(binding, graph)
        self._cuda.launch(self._graphs[graph])

    def _run(self, binding: _Binding) -> None:
        context = self._contexts[self._profile(binding)]
        for name, place in binding.inputs.items():
            if place.on_host:
                self._arrays[name].update_inplace(_host_array(place))
        self._bind(context, binding)
        self._enqueue(context)
        for name, place in binding.outputs.items():
            if place.on_host:
                _host_array(place)[:] = self._arrays[name].begin(place.shape, place.dtype).reshape(-1)

    def _capture(self, binding: _Binding, graph: int) -> None:
        """Capture a run. TensorRT wants an ordinary one before, which does what is left to do after new shapes."""
        context = self._context(self._profile(binding))
        self._captured.append(context)
        self._bind(context, binding)
        self._enqueue(context)
        self._cuda.wait()
        with self._cuda.capture(self._graphs, graph):
            self._enqueue(context)

    def _profile(self, binding: _Binding) -> int:
        """Decode steps have one token a row, and no visual one; the vision tower has one profile."""
        inputs = binding.inputs
        if "input_ids" not in inputs:
            return 0
        visual = inputs["visual_index"].shape[0] if "visual_index" in inputs else 0
        return DECODE if inputs["input_ids"].shape[1] == 1 and not visual else PREFILL

    def _bind(self, context: Any, binding: _Binding) -> None:
        for name, place in binding.inputs.items():
            self._check(context.set_input_shape(name, place.shape), f"the shape {list(place.shape)} of {name}")
        for name, place in (binding.inputs | binding.outputs).items():
            address = self._arrays[name].address if place.on_host else place.address
            self._check(context.set_tensor_address(name, address), f"the address of {name}")

    def _enqueue(self, context: Any) -> None:
        self._check(context.execute_async_v3(int(self._cuda.stream)), "to run a step")


def _host_array(place: _Place) -> NDArray[Any]:
    """The host memory that is bound, flat."""
    raw = np.ctypeslib.as_array((ctypes.c_uint8 * place.nbytes).from_address(place.address))
    return raw.view(place.dtype)


@dataclass
class _RunOptions:
    """As ONNX Runtime's RunOptions."""

    graph: int = NO_GRAPH

    def add_run_config_entry(self, key: str, value: str) -> None:
        if key == GRAPH_ID:
            self.graph = int(value)


class _Values:
    """What `DecodeGraphs` calls of ONNX Runtime: arrays on the device, and run options."""

    RunOptions = _RunOptions

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.OrtValue = self

    def ortvalue_from_numpy(self, values: NDArray[Any], device: str, _: int) -> DeviceArray:
        made = self.ortvalue_from_shape_and_type(values.shape, values.dtype, device, 0)
        made.update_inplace(values)
        return made

    def ortvalue_from_shape_and_type(self, shape: tuple[int, ...], kind: Any, _: str, __: int) -> DeviceArray:
        return DeviceArray(self._cuda, shape, np.dtype(kind), "inputs and outputs of a decode step")


class SlabMemory:
    """The slab as one block on the device; see CacheMemory."""

    device = "cuda"

    def __init__(self, slab: Slab, cuda: Cuda) -> None:
        self._cuda = cuda
        self._entries = {entry.name: entry for entry in slab.entries}
        self._base = cuda.allocate(slab.nbytes, "the cache")

    def address(self, name: str, row: int) -> int:
        """See CacheMemory."""
        entry = self._entries[name]
        return self._base + entry.offset + row * entry.row_bytes

    def read(self, row: int, *names: str) -> dict[str, NDArray[Any]]:
        """See CacheMemory; copies."""
        out = {}
        for name in names or self._entries:
            entry = self._entries[name]
            out[name] = np.empty(entry.shape[1:], numpy_dtype(entry.dtype))
            self._cuda.download(out[name].ctypes.data, self.address(name, row), entry.row_bytes)
        self._cuda.wait()
        return out

    def write(self, row: int, payload: bytes) -> None:
        """See CacheMemory."""
        source, offset = np.frombuffer(payload, np.uint8), 0
        for name, entry in self._entries.items():
            self._cuda.upload(self.address(name, row), source[offset:].ctypes.data, entry.row_bytes)
            offset += entry.row_bytes
        self._cuda.wait()

    def reset(self, row: int) -> None:
        """See CacheMemory."""
        for name in SMALL:
            self._cuda.clear(self.address(name, row), self._entries[name].row_bytes)
