"""CUDA's runtime, as far as the TensorRT backend calls it: one stream, memory, copies and graphs.

*Not run here* on a GPU: tests run it on a stand-in (tests/fake_tensorrt.py), whose names and parameters are compared
with those of `cuda.bindings`.
"""

import contextlib
import ctypes
import math
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimkv_export.errors import EngineError, MissingDependencyError

__all__ = ["Cuda", "DeviceArray", "import_cuda"]


def import_cuda() -> Any:
    """The module `cuda.bindings.runtime`.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise MissingDependencyError(
            f"running a TensorRT engine needs the Python package cuda-bindings ({error}); install it with: pip install "
            "'trimkv-export[tensorrt]', or for CUDA 12, as on JetPack 6.2: pip install 'cuda-bindings==12.9.*'"
        ) from None
    return runtime


class Cuda:
    """One stream, and everything that was allocated for it, which is freed with it.

    What is put on the stream happens in order, and later: only `wait` waits for it. Every method raises EngineError
    where CUDA reports a fault.
    """

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self._owned: list[tuple[str, Any]] = []  # (the call that frees it, what)
        weakref.finalize(self, _free, runtime, self._owned)
        self.stream = self._call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking)

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *values = getattr(self._runtime, name)(*arguments)
        if error != self._runtime.cudaError_t.cudaSuccess:
            text = self._runtime.cudaGetErrorString(error)[1]
            raise EngineError(f"CUDA failed in {name}: {text.decode() if isinstance(text, bytes) else text}")
        return values[0] if len(values) == 1 else tuple(values)

    def allocate(self, nbytes: int, what: str) -> int:
        """Address of new device memory of `nbytes` zeros, aligned to 256 bytes; errors name `what` needs it."""
        try:
            address = int(self._call("cudaMalloc", nbytes))
        except EngineError as error:
            free, total = self._call("cudaMemGetInfo")
            raise EngineError(
                f"{error}: {what} takes {nbytes:,} bytes, and {free:,} of {total:,} are free; end other programs that "
                "use the GPU, or build with a smaller --budget or --max-batch"
            ) from None
        self._owned.append(("cudaFree", address))
        self.clear(address, nbytes)
        return address

    def host(self, nbytes: int) -> NDArray[np.uint8]:
        """Host memory that copies to and from the device need not wait for."""
        address = int(self._call("cudaHostAlloc", nbytes, self._runtime.cudaHostAllocDefault))
        self._owned.append(("cudaFreeHost", address))
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))

    def clear(self, address: int, nbytes: int) -> None:
        """Write zeros."""
        self._call("cudaMemsetAsync", address, 0, nbytes, self.stream)

    def upload(self, address: int, source: int, nbytes: int) -> None:
        """Copy from the host."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, source, nbytes, kind, self.stream)

    def download(self, target: int, address: int, nbytes: int) -> None:
        """Copy to the host; it is there after `wait`."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", target, address, nbytes, kind, self.stream)

    def wait(self) -> None:
        """Wait until the stream has done everything."""
        self._call("cudaStreamSynchronize", self.stream)

    @contextlib.contextmanager
    def capture(self, graphs: dict[int, Any], number: int) -> Iterator[None]:
        """Within this context, calls do not run: they become the graph `graphs[number]`."""
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self.stream, mode)
        try:
            yield
        finally:
            graph = self._call("cudaStreamEndCapture", self.stream)
        graphs[number] = self._call("cudaGraphInstantiate", graph, 0)
        self._owned.append(("cudaGraphExecDestroy", graphs[number]))
        self._call("cudaGraphDestroy", graph)

    def launch(self, graph: Any) -> None:
        """Put a graph on the stream."""
        self._call("cudaGraphLaunch", graph, self.stream)


def _free(runtime: Any, owned: list[tuple[str, Any]]) -> None:
    for call, what in reversed(owned):
        getattr(runtime, call)(what)


class DeviceArray:
    """An array on the device, with host memory of its size for copies. Its methods are those of ORT's OrtValue."""

    def __init__(self, cuda: Cuda, shape: tuple[int, ...], dtype: np.dtype[Any], what: str) -> None:
        self._cuda, self.shape, self.dtype = cuda, shape, dtype
        nbytes = max(1, math.prod(shape) * dtype.itemsize)  # an empty one has an address too
        self.address = cuda.allocate(nbytes, what)
        self._host = cuda.host(nbytes)

    def update_inplace(self, values: NDArray[Any]) -> None:
        """Copy values, no more bytes than the array has, to the device; the caller may change them right after."""
        raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self._host[: raw.size] = raw
        if raw.size:
            self._cuda.upload(self.address, self._host.ctypes.data, raw.size)

    def numpy(self) -> NDArray[Any]:
        """Wait, and return a copy."""
        return self.begin(self.shape, self.dtype).copy()

    def begin(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Wait, and return what the memory begins with: a view, until the next call."""
        nbytes = math.prod(shape) * dtype.itemsize
        self._cuda.download(self._host.ctypes.data, self.address, nbytes)
        self._cuda.wait()
        return self._host[:nbytes].view(dtype).reshape(shape)
