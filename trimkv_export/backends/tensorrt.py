"""TensorRT's Python module and its plugin library: how they are found, and what they say."""

import importlib
from pathlib import Path
from typing import Any

from trimkv_export.config import Target
from trimkv_export.errors import EngineError, MissingDependencyError

__all__ = ["PLUGIN", "create", "find_plugin", "import_tensorrt", "load_plugin", "make_log"]

PLUGIN = "libtrimkv_plugin.so"
FOLDER = Path(__file__).resolve().parent.parent / "native"
# (namespace, version) of both plugins.
CREATORS = {"PoolAttention": ("trimkv", "1"), "PoolUpdate": ("trimkv", "1")}
MODULES = {Target.TENSORRT: "tensorrt", Target.TENSORRT_LLM: "tensorrt", Target.TENSORRT_RTX: "tensorrt_rtx"}
INSTALL = {
    Target.TENSORRT: (
        "On a Jetson it is the system's: a virtual environment made with --system-site-packages sees it (JetPack 6.2 "
        "has TensorRT 10.3, for Python 3.10 only: see docs/tensorrt.md). Elsewhere: pip install tensorrt-cu13 with "
        "CUDA 13, tensorrt-cu12 with CUDA 12"
    ),
    Target.TENSORRT_LLM: "It comes with TensorRT-LLM: pip install tensorrt-llm==1.2.1",
    Target.TENSORRT_RTX: "Install it with: pip install 'trimkv-export[tensorrt-rtx]' (x86-64 Linux)",
}


def import_tensorrt(target: Target) -> Any:
    """TensorRT's module for a target.

    Raises:
        MissingDependencyError: it is not installed; the message says what to install where.
    """
    name = MODULES[target]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"target {target} needs the Python package {name!r} ({error}). {INSTALL[target]}"
        ) from None


def make_log(tensorrt: Any) -> Any:
    """An ILogger that prints nothing; its `errors` are TensorRT's messages of that severity and worse."""

    class Log(tensorrt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (tensorrt.ILogger.INTERNAL_ERROR, tensorrt.ILogger.ERROR):
                self.errors.append(msg)

        def said(self) -> str:
            """The first error, which names the cause; later ones follow from it."""
            return self.errors[0].strip() if self.errors else "TensorRT did not say why"

    return Log()


def create(make: Any, log: Any, what: str) -> Any:
    """What `make`, a constructor of TensorRT's, returns.

    Raises:
        EngineError: it makes nothing; the log is quoted.
    """
    try:
        made = make()
    except TypeError:  # pybind11, of a factory that returned a null pointer
        made = None
    if made is None:
        raise EngineError(f"TensorRT cannot make {what}: {log.said()}")
    return made


def find_plugin() -> Path | None:
    """The plugin library of this installation, None where it was not built."""
    library = FOLDER / PLUGIN
    return library if library.is_file() else None


def load_plugin(registry: Any, library: Path, log: Any) -> None:
    """Load the plugin library into a registry.

    Never with TensorRT-RTX, whose parser ends the process over a plugin.

    Raises:
        EngineError: it cannot be loaded, or is built for another version of TensorRT.
    """
    try:
        registry.load_library(str(library))
    except Exception as error:  # pybind11's, of a handle that is null
        raise EngineError(f"TensorRT cannot load {library}: {log.said()} ({error})") from None
    for name, (namespace, version) in CREATORS.items():
        if registry.get_creator(name, version, namespace) is None:
            raise EngineError(
                f"{library} has no plugin {name} that this TensorRT can use: {log.said()}. Build the library for this "
                "major version of TensorRT (plugins/tensorrt/README.md)"
            )
