"""Check a package: against recorded cases of the official code, and against the NumPy decoder and policy."""

from trimkv_export.verify.oracle import CaseReport, replay_case
from trimkv_export.verify.selfcheck import SelfCheckReport, check_engine

__all__ = ["CaseReport", "SelfCheckReport", "check_engine", "replay_case"]
