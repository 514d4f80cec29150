"""Memory of this process, as the kernel and a GPU's driver count it.

Imported first, so that `AT_START` is from before any library.
"""

import os
from pathlib import Path

from trimkv_export.errors import EngineError, missing

__all__ = ["AT_START", "gpu_bytes", "status_bytes"]


def status_bytes(field: str) -> int:
    """Bytes of a field of /proc/self/status, such as VmRSS (now) or VmHWM (at most); 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def gpu_bytes() -> int:
    """Bytes that this process has on all GPUs, its CUDA context included, by NVML.

    ONNX Runtime gives nothing back before it ends, so at the end this is also the most that it took.

    Raises:
        MissingDependencyError: nvidia-ml-py is not installed.
        EngineError: the driver does not say: on a Jetson, or in a container that hides process numbers.
    """
    try:
        import pynvml
    except ImportError:
        raise missing("reading a GPU's memory", "nvidia-ml-py", "nvml") from None
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        found = [
            process.usedGpuMemory
            for handle in handles
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
            if process.pid == os.getpid()
        ]
    except pynvml.NVMLError as error:
        raise EngineError(f"the GPU's driver does not say what this process takes (NVML: {error})") from None
    if not found or None in found:
        raise EngineError(
            "the GPU's driver does not list this process and its memory (a Jetson, or a container with process numbers "
            "of its own: run it with --pid=host)"
        )
    return sum(found)


AT_START = status_bytes("VmRSS")
