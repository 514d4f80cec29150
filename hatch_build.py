"""Builds the native kernels into the wheel, where ONNX Runtime's headers are at hand.

    ONNXRUNTIME_INCLUDE_DIR=/usr/include/onnxruntime pip install .

Without the headers, CMake or a compiler the wheel has no native library, and packages run with their portable bodies.
An editable install is left to `make plugins`.
"""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARY = "libtrimkv_onnxruntime.so"
HEADER = "onnxruntime_c_api.h"
USUAL = (
    "/usr/include/onnxruntime",
    "/usr/local/include/onnxruntime",
    "build/onnxruntime-headers/usr/include/onnxruntime",
)


class NativeKernels(BuildHookInterface):  # type: ignore[type-arg]
    """Runs CMake before a wheel is written."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build, and add the library to the wheel, which then is for this platform."""
        if version == "editable":
            return
        root = Path(self.root)
        folders = [os.environ.get("ONNXRUNTIME_INCLUDE_DIR") or "", *USUAL]
        headers = next((root / folder for folder in folders if folder and (root / folder / HEADER).is_file()), None)
        if headers is None or shutil.which("cmake") is None:
            missing = "ONNX Runtime's headers (ONNXRUNTIME_INCLUDE_DIR)" if headers is None else "CMake"
            self.app.display_warning(f"no native kernels in this wheel: {missing} not found")
            return
        build = root / "build" / "wheel"
        subprocess.run(  # noqa: S603
            ["cmake", "-S", str(root / "plugins"), "-B", str(build), f"-DONNXRUNTIME_INCLUDE_DIR={headers}"],  # noqa: S607
            check=True,
        )
        subprocess.run(["cmake", "--build", str(build), "--parallel", "2"], check=True)  # noqa: S603, S607
        build_data["force_include"][str(build / LIBRARY)] = f"trimkv_export/native/{LIBRARY}"
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
