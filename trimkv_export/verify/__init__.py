"""Check a package: against recorded cases of the official code, the NumPy decoder and policy, and TensorRT."""

from trimkv_export.verify.oracle import CaseReport, replay_case
from trimkv_export.verify.polygraphy import BackendReport, compare_backends
from trimkv_export.verify.selfcheck import SelfCheckReport, check_engine

__all__ = ["BackendReport", "CaseReport", "SelfCheckReport", "check_engine", "compare_backends", "replay_case"]
