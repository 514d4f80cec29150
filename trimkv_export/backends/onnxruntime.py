"""The one place that imports ONNX Runtime."""

import os
from typing import Any

from trimkv_export.errors import MissingDependencyError

__all__ = ["import_onnxruntime"]

# ONNX Runtime 1.32 reports usage to its maker by default, from a thread of its own with a database under ~/.cache.
TELEMETRY_OFF = "ORT_DISABLE_TELEMETRY"


def import_onnxruntime() -> Any:
    """The module, with its telemetry off unless the environment says otherwise. Raises MissingDependencyError."""
    os.environ.setdefault(TELEMETRY_OFF, "1")
    try:
        import onnxruntime
    except ImportError:
        raise MissingDependencyError(
            "running a package needs onnxruntime; install it with: pip install 'trimkv-export[runtime]'"
        ) from None
    return onnxruntime
