"""The refusal of a package that its device cannot hold."""

from dataclasses import replace

from trimkv_export.config import BuildOptions, Precision
from trimkv_export.engine.planner import ModelPlan, plan_model
from trimkv_export.errors import OptionError
from trimkv_export.memory import device

__all__ = ["fitting_plan"]


def fitting_plan(options: BuildOptions) -> ModelPlan | None:
    """The plan of the package on the device it is for; None if it is for none. Reads config.json files only.

    Raises OptionError when the package does not fit, saying what would, and what `plan_model` raises.
    """
    if options.device is None:
        return None
    profile, asked = device(options.device), options.plan_options()
    if not _runs(asked.precision, profile.kind):
        raise OptionError(f"{profile.name} does not run {asked.precision}; build with {_flags(profile.kind)}")
    made = plan_model(asked)
    plan = made.plan
    if plan.fits is False:
        raise OptionError(
            f"{options.model} does not fit {profile.name}: {asked.precision}, budget {plan.budget} and batch "
            f"{plan.batch} take {plan.total_bytes:,} bytes of {plan.device_bytes:,}, {plan.reserve_bytes:,} of them "
            f"for system and runtime. {_remedies(made, profile.kind)}"
        )
    return made


def _remedies(made: ModelPlan, kind: str) -> str:
    """What would fit, each with the other options as they are."""
    plan, options = made.plan, made.options
    ways = []
    if plan.max_budget:
        ways.append(f"--budget {plan.max_budget} at most")
    if plan.max_sequences:
        ways.append(f"--max-batch {plan.max_sequences} at most")
    for precision in Precision:
        if precision is not options.precision and _runs(precision, kind):
            budget = plan_model(replace(options, precision=precision)).plan.max_budget or 0
            if budget >= options.budget:
                ways.append(f"--precision {precision}")
            elif budget:
                ways.append(f"--precision {precision} with --budget {budget} at most")
    if ways:
        return f"What fits: {', or '.join(ways)}"
    fixed = plan.weight_bytes + plan.reserve_bytes
    if fixed > (plan.device_bytes or 0):
        return (
            f"Its weights alone do not: with the reserve they take {fixed:,} bytes, and no other precision fits. Name "
            "a larger device or a smaller model"
        )
    return (
        "Its weights alone do, but not even a budget of 1 beside them, in any precision; try a smaller "
        "--prefill-chunk, --max-batch or --max-image-tokens"
    )


def _runs(precision: Precision, kind: str) -> bool:
    return kind != "cpu" or precision is not Precision.BF16  # ONNX Runtime's CPU provider has no bf16 products


def _flags(kind: str) -> str:
    return " or ".join(f"--precision {precision}" for precision in Precision if _runs(precision, kind))
