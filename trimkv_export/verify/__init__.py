"""Check a package: against recorded cases of the official code, the NumPy model, other packages, and TensorRT."""

from trimkv_export.verify.compare import Comparison, compare_engines
from trimkv_export.verify.oracle import CaseReport, RecordedCase, replay_case
from trimkv_export.verify.package import PackageReport, check_package
from trimkv_export.verify.polygraphy import BackendReport, compare_backends
from trimkv_export.verify.selfcheck import SelfCheckReport, check_engine

__all__ = [
    "BackendReport",
    "CaseReport",
    "Comparison",
    "PackageReport",
    "RecordedCase",
    "SelfCheckReport",
    "check_engine",
    "check_package",
    "compare_backends",
    "compare_engines",
    "replay_case",
]
