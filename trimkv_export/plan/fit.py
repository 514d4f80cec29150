"""What fits a device: the largest budget or batch, and what to change when a plan does not fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from trimkv_export.config import MAX_BUDGET, MAX_COUNT, BuildOptions, PlanOptions, Precision
from trimkv_export.errors import DoesNotFitError, OptionError
from trimkv_export.plan import DeviceProfile, Workload, device, devices, plan_memory
from trimkv_export.plan.memory_plan import largest
from trimkv_export.plan.planner import ModelPlan, PictureSizes, TowerPlan, plan_model

__all__ = ["Solution", "Unknown", "fitting_plan", "solve", "would_fit"]

Unknown = Literal["budget", "batch"]
LIMITS: Mapping[Unknown, int] = {"budget": MAX_BUDGET, "batch": MAX_COUNT}
# What takes less memory, the largest first.
SMALLER: Mapping[Precision, Sequence[Precision]] = {
    Precision.FP32: (Precision.FP16, Precision.INT4),
    Precision.FP16: (Precision.INT4,),
    Precision.BF16: (Precision.INT4,),
    Precision.INT8: (Precision.INT4,),
}


@dataclass(frozen=True)
class Solution:
    """The largest `unknown` with which a model fits a device.

    Attributes:
        unknown: what was looked for.
        value: 0 if not even 1 fits.
        device_bytes: the device's memory.
        one_more_bytes: the plan's total at value + 1; None where that is more than the option takes.
    """

    unknown: Unknown
    value: int
    device_bytes: int
    one_more_bytes: int | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        fits = None if self.one_more_bytes is None else self.one_more_bytes <= self.device_bytes
        return {
            "unknown": self.unknown,
            "value": self.value,
            "one_more_bytes": self.one_more_bytes,
            "one_more_fits": fits,
        }


def solve(options: PlanOptions, unknown: Unknown) -> tuple[Solution, ModelPlan]:
    """Find the largest budget or batch that fits `options.device`, and plan the model with it.

    What `options` say of the unknown does not matter. If not even 1 fits, the plan is the one for 1.

    Raises:
        OptionError: there is no device, or its memory is not known.
        TrimKVError: as `plan_model`.
    """
    if options.device is None:
        raise OptionError(f"--solve {unknown} needs a device to fill: add --device NAME")
    found = plan_model(_with(options, unknown, 1))
    plan, work = found.plan, found.workload.work
    value = plan.max_budget if unknown == "budget" else plan.max_sequences
    if value is None or plan.device_bytes is None:
        raise OptionError(f"--solve {unknown}: the memory of {options.device!r} is not known")
    more = None if value == LIMITS[unknown] else _total(_varied(work, unknown, value + 1))
    if value > 1:
        found = plan_model(_with(options, unknown, value))
    return Solution(unknown, value, plan.device_bytes, more), found


def would_fit(found: ModelPlan) -> list[str]:
    """Each change that makes a plan fit, the rest as it is, in words.

    Empty if the plan fits, or if no budget, batch, chunk, image size, precision or known device makes it fit.
    """
    plan, options, work, profile = found.plan, found.options, found.workload.work, found.profile
    if plan.fits is not False or profile is None or plan.device_bytes is None:
        return []
    memory, changes = plan.device_bytes, []
    if plan.max_budget:
        changes.append(f"--budget {plan.max_budget} or less")
    if plan.max_sequences:
        changes.append(f"--max-batch {plan.max_sequences} or less")
    chunk = largest(
        lambda tokens: _total(replace(work, prefill_chunk=tokens)) <= memory, max(options.prefill_chunk - 1, 0)
    )
    if chunk:
        changes.append(f"--prefill-chunk {chunk} or less")
    tower = found.workload.vision
    if tower is not None:
        changes += _smaller_pictures(found, tower)
    for smaller in SMALLER.get(options.precision, ()):
        if smaller not in profile.precisions:
            continue
        # TensorRT does not run int4 in blocks of the default size.
        larger_blocks = smaller is Precision.INT4 and options.target.decodes_in_tensorrt
        size = 128 if larger_blocks else options.block_size
        try:
            plan = plan_model(replace(options, precision=smaller, activations=None, block_size=size)).plan
        except OptionError:  # layers that do not divide into blocks, or a checkpoint that is quantised already
            continue
        if plan.fits or plan.max_budget:
            changes.append(
                f"--precision {smaller}{f' --block-size {size}' if larger_blocks else ''}"
                + ("" if plan.fits else f" with --budget {plan.max_budget} or less")
            )
            break
    if profile.kind != "cpu" and (larger := _larger_device(found, profile)):
        changes.append(f"--device {larger.name}")
    return changes


def fitting_plan(options: BuildOptions) -> ModelPlan | None:
    """The plan of a package on the device it is for; None if it is for none. Reads config.json files only.

    Raises:
        DoesNotFitError: the package does not fit; the message says what would.
        TrimKVError: what `plan_model` raises.
    """
    if options.device is None:
        return None
    profile, asked = device(options.device), options.plan_options()
    found = plan_model(asked)
    plan = found.plan
    if plan.fits is not False:
        return found
    changes = would_fit(found)
    weights = plan.weight_bytes + plan.reserve_bytes
    alone = f"Its weights alone do not: with the reserve they take {weights:,} bytes. "
    raise DoesNotFitError(
        f"{options.model} does not fit {profile.name}: {asked.precision}, budget {plan.budget} and batch {plan.batch} "
        f"take {plan.total_bytes:,} bytes of {plan.device_bytes:,}, {plan.reserve_bytes:,} of them for system and "
        f"runtime. {alone if weights > (plan.device_bytes or 0) else ''}"
        + (f"What would fit: {'; or '.join(changes)}" if changes else "Take a smaller model")
    )


def _larger_device(found: ModelPlan, profile: DeviceProfile) -> DeviceProfile | None:
    """The smallest device that the plan fits, of the same kind if there is one."""
    needed, precision = found.plan.total_bytes - profile.reserve_bytes, str(found.options.precision)
    fitting = [
        other
        for other in devices()
        if other.memory_bytes is not None
        and precision in other.precisions
        and needed + other.reserve_bytes <= other.memory_bytes
    ]
    return min(fitting, key=lambda other: (other.kind != profile.kind, other.memory_bytes or 0), default=None)


def _smaller_pictures(found: ModelPlan, tower: TowerPlan) -> list[str]:
    """The largest pictures with which the plan fits, by each of their sizes alone; none if no picture is too much."""
    others, memory = found.plan.total_bytes - found.plan.vision_bytes, found.plan.device_bytes or 0
    sizes, changes = PictureSizes.of(found.options), []
    for flag, name in (
        ("--max-image-tokens", "tokens"), ("--max-image-pixels", "image_pixels"), ("--max-frames", "frames"),
    ):  # fmt: skip
        most = largest(
            lambda value, name=name: others + tower.nbytes(replace(sizes, **{name: value})) <= memory,  # type: ignore[misc]
            getattr(sizes, name) - 1,
        )
        if most > (name == "frames"):  # a video has two at least
            changes.append(f"{flag} {most} or less")
    return changes


def _with(options: PlanOptions, unknown: Unknown, value: int) -> PlanOptions:
    return replace(options, budget=value) if unknown == "budget" else replace(options, max_batch=value)


def _varied(work: Workload, unknown: Unknown, value: int) -> Workload:
    return replace(work, cache=replace(work.cache, budget=value)) if unknown == "budget" else replace(work, batch=value)


def _total(work: Workload) -> int:
    return plan_memory(work).total_bytes
