"""Check a package: against recorded cases of the official code, the NumPy decoder and policy, and other packages."""

from trimkv_export.verify.compare import Comparison, compare_engines
from trimkv_export.verify.oracle import CaseReport, replay_case
from trimkv_export.verify.selfcheck import SelfCheckReport, check_engine

__all__ = ["CaseReport", "Comparison", "SelfCheckReport", "check_engine", "compare_engines", "replay_case"]
