"""TensorRT's Python module and CUDA's runtime, as far as we call them, on the host.

Device memory is host memory, and what is put on a stream happens when the host waits for it, as late as it may. An
engine runs the graph that it was built from, with the portable bodies or the native kernels, in ONNX Runtime.

These classes are also the list of what `build/tensorrt.py` and `runtime/tensorrt.py` use: names and parameters are
compared with those of the real modules (tests/unit/backends/test_backends_tensorrt_api.py).
"""

import ctypes
import itertools
import json
import math
from collections.abc import Callable, Sequence
from enum import Enum, IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from trimkv_export.backends.native import find_library
from trimkv_export.graph.tensorrt import PLUGINS
from trimkv_export.package import parser_file

__version__ = "10.3.0"

# Standard operators that the parser does not know.
UNKNOWN_OPERATORS: set[str] = set()
# Libraries that were loaded, and engines that were built, in this process; a test clears them.
LOADED: list[str] = []
BUILT: list[dict[str, Any]] = []
REFITTED: list[str] = []


# Attributes of the real classes that we read or write, beside the methods here.
ATTRIBUTES = {
    "IBuilderConfig": ("progress_monitor", "profiling_verbosity"),
    "ICudaEngine": ("num_io_tensors", "num_optimization_profiles", "weight_streaming_budget_v2"),
    "OnnxParser": ("num_errors",),
    "OnnxParserRefitter": ("num_errors",),
}
NOT_TENSORRT = ("Stream", "CudaRuntime")
# Of CUDA's runtime.
CUDA_ENUMS = {
    "cudaError_t": {"cudaSuccess": 0},
    "cudaMemcpyKind": {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2},
    "cudaStreamCaptureMode": {"cudaStreamCaptureModeThreadLocal": 1},
}


class NetworkDefinitionCreationFlag(IntEnum):
    STRONGLY_TYPED = 1


class BuilderFlag(Enum):
    REFIT_IDENTICAL = 1
    STRIP_PLAN = 2
    TF32 = 3
    WEIGHT_STREAMING = 4


class ProfilingVerbosity(Enum):
    DETAILED = 1


class MemoryPoolType(Enum):
    WORKSPACE = 0


class LayerInformationFormat(Enum):
    JSON = 1


class ExecutionContextAllocationStrategy(Enum):
    USER_MANAGED = 2


class TensorIOMode(Enum):
    INPUT = 1
    OUTPUT = 2


class DataType(Enum):
    FLOAT = onnx.TensorProto.FLOAT
    HALF = onnx.TensorProto.FLOAT16
    BF16 = onnx.TensorProto.BFLOAT16
    INT32 = onnx.TensorProto.INT32
    INT64 = onnx.TensorProto.INT64
    BOOL = onnx.TensorProto.BOOL


class ErrorCode(Enum):
    INVALID_NODE = 6


class ILogger:
    INTERNAL_ERROR, ERROR = range(2)

    def log(self, severity: int, msg: str) -> None:
        raise NotImplementedError


class IProgressMonitor:
    def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
        raise NotImplementedError

    def step_complete(self, phase_name: str, step: int) -> bool:
        raise NotImplementedError

    def phase_finish(self, phase_name: str) -> None:
        raise NotImplementedError


class IPluginRegistry:
    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], object] = {}

    def load_library(self, plugin_path: str) -> object:
        """A library of ours is any file that says so."""
        LOADED.append(plugin_path)
        if Path(plugin_path).read_bytes() == b"plugins":
            self.creators |= {(name, "1", "trimkv"): object() for name in PLUGINS}
        return object()

    def get_creator(self, type: str, version: str, plugin_namespace: str = "") -> object:  # noqa: A002
        return self.creators.get((type, version, plugin_namespace))


class IOptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, input: str, min: Sequence[int], opt: Sequence[int], max: Sequence[int]) -> None:  # noqa: A002
        self.shapes[input] = [list(min), list(opt), list(max)]


class ITimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content + b"+"


class IBuilderConfig:
    def __init__(self) -> None:
        self.progress_monitor: Any = None
        self.profiling_verbosity: object = None
        self.profiles: list[IOptimizationProfile] = []
        self.flags = {BuilderFlag.TF32}
        self.limits: dict[MemoryPoolType, int] = {}
        self.cache: ITimingCache | None = None

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.discard(flag)

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        self.limits[pool] = pool_size

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return not cache.content.startswith(b"other")

    def get_timing_cache(self) -> ITimingCache | None:
        return self.cache


class INetworkDefinition:
    def __init__(self, builder: "Builder", flags: int) -> None:
        self.builder, self.creation_flags = builder, flags
        self.file = Path()


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self.logger, self.registry = logger, IPluginRegistry()

    def get_plugin_registry(self) -> IPluginRegistry:
        return self.registry

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return INetworkDefinition(self, flags)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
        """The plan holds the graph with its weights, and the profiles."""
        for step in range(2):
            config.progress_monitor.phase_start("Building", "", 2)
            if not config.progress_monitor.step_complete("Building", step):
                self.logger.log(ILogger.ERROR, "the build was cancelled")
                return None
            config.progress_monitor.phase_finish("Building")
        BUILT.append({
            "graph": network.file.name, "creation_flags": network.creation_flags, "flags": config.flags,
            "limits": config.limits, "profiles": [profile.shapes for profile in config.profiles],
        })  # fmt: skip
        whole = next(file for file in network.file.parent.glob("*.onnx") if parser_file(file) == network.file)
        profiles = json.dumps([profile.shapes for profile in config.profiles]).encode()
        graph: bytes = onnx.load(str(whole)).SerializeToString()
        return profiles + b"\n" + graph


class ParserError:
    def __init__(self, node: onnx.NodeProto) -> None:
        self._node = node

    def node_name(self) -> str:
        return self._node.name

    def node_operator(self) -> str:
        return self._node.op_type

    def desc(self) -> str:
        return "Plugin not found"

    def code(self) -> ErrorCode:
        return ErrorCode.INVALID_NODE


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network, self.logger = network, logger
        self.errors: list[ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self.errors)

    def get_error(self, index: int) -> ParserError:
        return self.errors[index]

    def supports_operator(self, op_name: str) -> bool:
        return op_name not in UNKNOWN_OPERATORS

    def parse_from_file(self, model: str) -> bool:
        """As TensorRT 10.3: a node that is no local function and no standard operator is a plugin."""
        graph = onnx.load(model, load_external_data=False)
        bodies = {(function.domain, function.name) for function in graph.functions}
        self._network.file = Path(model)
        for node in graph.graph.node:
            values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            known = node.domain == "" and self.supports_operator(node.op_type)
            if known or (node.domain, node.op_type) in bodies:
                continue
            key = tuple(values.get(name, b"").decode() for name in ("plugin_version", "plugin_namespace"))
            if self._network.builder.registry.get_creator(node.op_type, *key) is None:
                self.errors.append(ParserError(node))
        return not self.errors


class EngineInspector:
    def get_engine_information(self, format: LayerInformationFormat) -> str:  # noqa: A002
        return json.dumps({"Layers": [], "format": format.name})


class ICudaEngine:
    def __init__(self, plan: bytes, runtime: "Runtime") -> None:
        profiles, _, graph = plan.partition(b"\n")
        self.runtime, self.profiles = runtime, json.loads(profiles)
        self.model = onnx.load_from_string(graph)
        self.tensors = {t.name: t.type.tensor_type for t in [*self.model.graph.input, *self.model.graph.output]}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        if library := find_library():
            options.register_custom_ops_library(str(library))
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.num_optimization_profiles, self.num_io_tensors = len(self.profiles), len(self.tensors)
        self.weight_streaming_budget_v2 = -1

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector()

    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> "IExecutionContext":
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        return IExecutionContext(self)

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return 1000 + 24 * profile_index

    def get_tensor_name(self, index: int) -> str:
        return str(list(self.tensors)[index])

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if any(name == t.name for t in self.model.graph.input) else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType(self.tensors[name].elem_type)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        fixed = [dim.dim_value for dim in self.tensors[name].shape.dim]
        found: list[list[int]] = self.profiles[profile_index].get(name, [fixed] * 3)
        return found

    def get_weight_streaming_automatic_budget(self) -> int:
        return 1 << 20


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self.engine = engine
        self.profile, self.memory = 0, (0, 0)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_device_memory(self, memory: int, size: int) -> None:
        self.memory = memory, size

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.profile = profile_index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.get_tensor_profile_shape(name, self.profile)
        self.shapes[name] = tuple(shape)
        return len(shape) == len(low) and all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return memory != 0

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Put a run with the present shapes and addresses on the stream."""
        needed = self.engine.get_device_memory_size_for_profile_v2(self.profile)
        assert self.memory[0]
        assert self.memory[1] >= needed
        assert set(self.addresses) == set(self.engine.tensors), "not all tensors have an address"
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        Stream.of(stream_handle).put("execute", lambda: self._run(shapes, addresses))
        return True

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        feed = {}
        for name, shape in shapes.items():
            dtype = onnx.helper.tensor_dtype_to_np_dtype(self.engine.tensors[name].elem_type)
            raw = (ctypes.c_uint8 * (math.prod(shape) * dtype.itemsize)).from_address(addresses[name])
            feed[name] = np.ctypeslib.as_array(raw).view(dtype).reshape(shape)
        for info, value in zip(self.engine.session.get_outputs(), self.engine.session.run(None, feed), strict=True):
            whole = np.ascontiguousarray(value)
            ctypes.memmove(addresses[info.name], whole.ctypes.data, whole.nbytes)


class Refitter:
    def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
        self.engine = engine

    def refit_cuda_engine(self) -> bool:
        return True


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger: ILogger) -> None:
        self.num_errors = 0

    def get_error(self, index: int) -> ParserError:
        raise IndexError(index)

    def refit_from_file(self, model: str) -> bool:
        REFITTED.append(model)
        return True


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self.logger, self.registry = logger, IPluginRegistry()

    def get_plugin_registry(self) -> IPluginRegistry:
        return self.registry

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        plan = bytes(memoryview(serialized_engine))
        if not plan.startswith(b"["):
            self.logger.log(ILogger.ERROR, "the engine is of another TensorRT")
            return None
        return ICudaEngine(plan, self)


Graph = list[Callable[[], object]]


class Stream:
    """What is still to happen, or, while it is captured, what a graph is to do."""

    all: dict[int, "Stream"] = {}  # noqa: RUF012
    numbers = itertools.count(1)

    def __init__(self) -> None:
        self.number = next(self.numbers)
        self.all[self.number] = self
        self.waiting: Graph = []
        self.captured: Graph | None = None
        self.log: list[str] = []

    @classmethod
    def of(cls, handle: int) -> "Stream":
        return cls.all[int(handle)]

    def __int__(self) -> int:
        return self.number

    def put(self, name: str, work: Callable[[], object]) -> None:
        self.log.append(name if self.captured is None else f"captured {name}")
        (self.waiting if self.captured is None else self.captured).append(work)


class CudaRuntime:
    """`cuda.bindings.runtime`: each call returns a tuple that begins with the error."""

    cudaStreamNonBlocking = 1  # noqa: N815
    cudaHostAllocDefault = 0  # noqa: N815
    cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode = (  # noqa: N815
        SimpleNamespace(**members) for members in CUDA_ENUMS.values()
    )

    def __init__(self, limit: int = 1 << 40) -> None:
        self.limit, self.blocks = limit, dict[int, NDArray[np.uint8]]()
        self.stream = Stream()

    def _allocate(self, size: int) -> tuple[int, int]:
        if sum(block.size for block in self.blocks.values()) + size > self.limit:
            return 2, 0
        block = np.full(size + 256, 0xAA, np.uint8)  # never zero by chance
        address = -(-block.ctypes.data // 256) * 256
        self.blocks[address] = block
        return 0, address

    def _free(self, address: int) -> tuple[int]:
        del self.blocks[address]
        return (0,)

    def cudaMalloc(self, size: int) -> tuple[int, int]:  # noqa: N802
        return self._allocate(size)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[int, int]:  # noqa: N802
        return self._allocate(size)

    def cudaFree(self, devPtr: int) -> tuple[int]:  # noqa: N802, N803
        return self._free(devPtr)

    def cudaFreeHost(self, ptr: int) -> tuple[int]:  # noqa: N802
        return self._free(ptr)

    def cudaMemGetInfo(self) -> tuple[int, int, int]:  # noqa: N802
        return 0, self.limit - sum(block.size for block in self.blocks.values()), self.limit

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:  # noqa: N802
        return 0, {2: b"out of memory"}.get(error, b"unknown error")

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, Stream]:  # noqa: N802
        return 0, self.stream

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: int, stream: Stream) -> tuple[int]:  # noqa: N802
        stream.put({1: "upload", 2: "download"}[kind], lambda: ctypes.memmove(dst, src, count))
        return (0,)

    def cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: Stream) -> tuple[int]:  # noqa: N802, N803
        stream.put("clear", lambda: ctypes.memset(devPtr, value, count))
        return (0,)

    def cudaStreamSynchronize(self, stream: Stream) -> tuple[int]:  # noqa: N802
        assert stream.captured is None
        stream.log.append("wait")
        waiting, stream.waiting = stream.waiting, []
        for work in waiting:
            work()
        return (0,)

    def cudaStreamBeginCapture(self, stream: Stream, mode: int) -> tuple[int]:  # noqa: N802
        stream.captured = []
        return (0,)

    def cudaStreamEndCapture(self, stream: Stream) -> tuple[int, Graph]:  # noqa: N802
        captured, stream.captured = stream.captured or [], None
        return 0, captured

    def cudaGraphInstantiate(self, graph: Graph, flags: int) -> tuple[int, Graph]:  # noqa: N802
        return 0, graph

    def cudaGraphExecDestroy(self, graphExec: Graph) -> tuple[int]:  # noqa: N802, N803
        return (0,)

    def cudaGraphDestroy(self, graph: Graph) -> tuple[int]:  # noqa: N802
        return (0,)

    def cudaGraphLaunch(self, graphExec: Graph, stream: Stream) -> tuple[int]:  # noqa: N802, N803
        stream.put("launch", lambda: [work() for work in graphExec])
        return (0,)
