"""The one place that imports ONNX Runtime."""

import os
from typing import Any

from trimkv_export.errors import missing

__all__ = ["import_onnxruntime"]


def import_onnxruntime() -> Any:
    """The module, with its telemetry off unless the environment says otherwise.

    Raises:
        MissingDependencyError: it is not installed.
    """
    # ONNX Runtime 1.32 reports usage to its maker by default, from a thread of its own with a database under ~/.cache.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError:
        raise missing("running a package", "onnxruntime", "runtime") from None
    return onnxruntime
