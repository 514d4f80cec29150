"""Builds the native kernels into the wheel.

    pip install .                                                          headers found, or fetched (Debian, GitHub)
    ONNXRUNTIME_INCLUDE_DIR=/usr/include/onnxruntime pip install .         headers named

Needs Linux, a C++17 compiler and make; CMake comes with the build. Where something is missing the wheel has no native
library, and packages run with their portable bodies: `trimkv-export doctor` says so. With everything there, a library
that does not compile is an error. An editable install is left to `make plugins`.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARY = "libtrimkv_onnxruntime.so"
HEADER = "onnxruntime_c_api.h"
USUAL = ("/usr/include/onnxruntime", "/usr/local/include/onnxruntime")
FETCH_SECONDS = 300


class NativeKernels(BuildHookInterface):  # type: ignore[type-arg]
    """Runs CMake before a wheel is written."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build, and add the library to the wheel, which then is for this platform.

        Raises subprocess.CalledProcessError if the kernels do not compile.
        """
        if version == "editable":
            return
        root = Path(self.root)
        missing = _missing_tool()
        headers = None if missing else _headers(root)
        if headers is None:
            missing = missing or "ONNX Runtime's C headers: name their folder in ONNXRUNTIME_INCLUDE_DIR"
            self.app.display_warning(f"no native kernels in this wheel, it lacks {missing}")
            return
        build = root / "build" / "wheel"
        # Fresh: a cache may name the tools of an earlier build's environment, which is gone.
        configure = ["cmake", "--fresh", "-S", root / "plugins", "-B", build, f"-DONNXRUNTIME_INCLUDE_DIR={headers}"]
        jobs = str(os.cpu_count() or 1)
        subprocess.run(configure, check=True)  # noqa: S603
        subprocess.run(  # noqa: S603
            ["cmake", "--build", build, "--target", "trimkv_onnxruntime", "--parallel", jobs],  # noqa: S607
            check=True,
        )
        build_data["force_include"][str(build / LIBRARY)] = f"trimkv_export/native/{LIBRARY}"
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"


def _missing_tool() -> str | None:
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    tools = {"CMake": ["cmake"], "a C++ compiler": compilers, "make": ["make", "gmake"]}
    if sys.platform != "linux":
        return f"Linux (this is {sys.platform})"
    return next((name for name, commands in tools.items() if not any(map(shutil.which, commands))), None)


def _headers(root: Path) -> Path | None:
    """Folder of ONNX Runtime's C headers, fetched if need be; None if they cannot be had."""
    folders = [os.environ.get("ONNXRUNTIME_INCLUDE_DIR") or "", *USUAL]
    for folder in folders:
        if folder and (root / folder / HEADER).is_file():
            return root / folder
    script, target = root / "plugins" / "fetch_onnxruntime_headers.sh", root / "build" / "onnxruntime-headers"
    try:
        fetched = subprocess.run(  # noqa: S603
            ["bash", script, target],  # noqa: S607
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=FETCH_SECONDS,
        )
    except (OSError, subprocess.SubprocessError):  # the script has said why
        return None
    return Path(fetched.stdout.strip())
