"""Quality of a package against budget and policy, and its speed; the policies that are baselines live here alone."""

from trimkv_export.evaluation.bench import BenchReport, measure
from trimkv_export.evaluation.policies import EvaluatedPolicy
from trimkv_export.evaluation.quality import Answer, Result, default_budgets, evaluate
from trimkv_export.evaluation.tasks import Question, Task, Text, read_tasks
from trimkv_export.evaluation.variants import open_variant

__all__ = [
    "Answer",
    "BenchReport",
    "EvaluatedPolicy",
    "Question",
    "Result",
    "Task",
    "Text",
    "default_budgets",
    "evaluate",
    "measure",
    "open_variant",
    "read_tasks",
]
