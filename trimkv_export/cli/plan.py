"""`trimkv-export plan`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trimkv_export.cli.console import json_option, print_json, print_table
from trimkv_export.cli.options import (
    Command,
    given,
    grouped_option,
    list_options,
    print_lists,
    recipe_option,
    table_options,
    values_of,
)
from trimkv_export.cli.plots import load_plots
from trimkv_export.cli.usage import FILE
from trimkv_export.config import MEMORY, PlanOptions
from trimkv_export.errors import DoesNotFitError, OptionError, missing
from trimkv_export.words import amount

if TYPE_CHECKING:
    from trimkv_export.plan.fit import Solution
    from trimkv_export.plan.planner import ModelPlan

__all__ = ["command"]

EPILOG = """\b
Examples:
  trimkv-export plan --model qwen3-4b --budget 256
  trimkv-export plan --model qwen3-vl-4b --budget 256 --precision fp16 --device orin-nx-16gb
  trimkv-export plan --model qwen3-8b --precision fp16 --device l4 --max-batch 8 --solve budget
  trimkv-export plan --model qwen3-8b --budget 512 --precision fp16 --device h100 --plot plan.png
  trimkv-export plan --recipe qwen3-vl-4b-orin-nano-8gb --solve batch
"""


@click.command("plan", cls=Command, epilog=EPILOG)
@recipe_option
@table_options(PlanOptions)
@grouped_option(
    MEMORY, "--solve", type=click.Choice(["budget", "batch"]), help="Find the largest that fits the --device."
)
@grouped_option(MEMORY, "--plot", "picture", type=FILE, help="Draw the plan into this PNG file.")
@list_options
@json_option
def command(as_json: bool, picture: Path | None, solve: Any, **values: Any) -> None:
    """Plan the memory of a model: every byte before the first token, and what fits a device.

    It reads config.json alone, which comes with this program for each alias; no weights are needed. Where the model
    does not fit the --device, the report says what would, and the exit code is 11.
    """
    if print_lists(values, as_json):
        return
    values = values_of(values)
    unknown = "max_batch" if solve == "batch" else solve
    if solve and given(unknown):
        flag = unknown.replace("_", "-")
        raise OptionError(f"--solve {solve} finds the {solve} itself: leave out --{flag} {values[unknown]}")
    if values["budget"] is None:
        if solve != "budget":
            raise OptionError("plan needs a budget: give --budget M, or find one with --solve budget --device NAME")
        values["budget"] = 1
    options = PlanOptions(**values)
    try:
        from trimkv_export.plan.fit import solve as solve_for
        from trimkv_export.plan.fit import would_fit
        from trimkv_export.plan.planner import plan_model
    except ImportError as error:
        raise missing("planning", str(error.name), "export") from None
    plots = load_plots("plan", "--plot", picture) if picture else None
    solution = None
    if solve:
        solution, found = solve_for(options, solve)
    else:
        found = plan_model(options)
    if picture and plots:
        plots.draw_plan(found, picture)
    changes = would_fit(found)
    if as_json:
        more: dict[str, Any] = {} if found.plan.fits is not False else {"would_fit": changes}
        more |= {"solved": solution.as_dict()} if solution else {}
        print_json(found.as_dict() | more | ({"picture": str(picture)} if picture else {}))
    else:
        rows = _parts(found) | _answers(found, changes)
        if solution:
            rows |= {"solved": _solved(solution, found)}
        print_table(_title(found), rows | ({"picture": str(picture)} if picture else {}))
    if found.plan.fits is False:
        sys.exit(DoesNotFitError.exit_code)


def _title(found: "ModelPlan") -> str:
    where = found.profile.title if found.profile else "ONNX Runtime on a CPU; add --device to compare with one"
    return f"Memory of {found.options.model} on {where}"


def _parts(found: "ModelPlan") -> dict[str, str]:
    plan, cache, options = found.plan, found.cache, found.options
    images = (
        f"{amount(plan.vision_bytes)}: weights, and pictures of at most {options.max_image_tokens:,} tokens, "
        f"{options.max_image_pixels:,} pixels and {options.max_frames:,} frames"
    )
    taken = "system and runtime" if found.profile and found.profile.kind != "cpu" else "the runtime"
    rows = {
        "weights": f"{amount(plan.weight_bytes)}: {found.model_type} in {options.precision}, "
        f"{found.gate_kind} gates; {found.workload.parameters:,} parameters"
        + (" with the vision tower" if plan.vision_bytes else ""),
        "cache": f"{amount(plan.cache_bytes)}: {_sequences(plan.batch)} of {plan.budget:,} entries for "
        f"{cache.num_streams} heads, {found.eviction.policy} policy, evicting every {cache.evict_every}",
        "activations": f"{amount(plan.activation_bytes)}: {amount(plan.prefill.activation_bytes)} at prefill "
        f"({plan.prefill_chunk} tokens a step), {amount(plan.decode.activation_bytes)} at decode",
        **({"vision tower": images} if plan.vision_bytes else {}),
        "inputs, outputs": amount(plan.io_bytes),
        "reserve": f"{amount(plan.reserve_bytes)}: {taken}",
        "total": amount(plan.total_bytes),
    }
    if plan.device_bytes is not None and plan.headroom_bytes is not None:
        rows["device memory"] = amount(plan.device_bytes)
        rows["headroom"] = ("-" if plan.headroom_bytes < 0 else "") + amount(abs(plan.headroom_bytes))
    return rows


def _answers(found: "ModelPlan", changes: list[str]) -> dict[str, str]:
    plan = found.plan
    rows = {}
    if plan.fits is not None and plan.headroom_bytes is not None:
        rows["fits"] = "yes" if plan.fits else _refusal(found, changes)
        rows["sequences"] = f"{plan.max_sequences:,} of budget {plan.budget:,} fit"
        rows["largest budget"] = f"{plan.max_budget:,} with {_sequences(plan.batch)}"
    if plan.tokens_per_second is not None and plan.full_cache_tokens_per_second is not None:
        rows["decode speed"] = (
            f"at most {plan.tokens_per_second:.1f} tokens/s by memory bandwidth; "
            f"{plan.full_cache_tokens_per_second:.1f} with a full cache of {plan.full_cache_context:,} tokens"
        )
    rows["full cache"] = (
        f"{amount(plan.full_cache_bytes)} at {plan.full_cache_context:,} tokens, "
        f"{plan.full_cache_bytes / plan.cache_bytes:.3g} times as much"
    )
    if plan.full_cache_max_context is not None:
        rows["full cache fits"] = f"up to {plan.full_cache_max_context:,} tokens" + (
            " for each sequence" if plan.batch > 1 else ""
        )
    return rows


def _refusal(found: "ModelPlan", changes: list[str]) -> str:
    short = amount(-(found.plan.headroom_bytes or 0))
    if not changes:
        return f"no, {short} too much, and no budget, batch, chunk, image size or precision makes it fit"
    return f"no, {short} too much. What would fit: {'; or '.join(changes)}"


def _solved(solution: "Solution", found: "ModelPlan") -> str:
    name = solution.unknown
    if solution.value == 0:
        return f"no {name} fits; the plan above is for a {name} of 1"
    value = f"the largest {name} that fits is {solution.value:,}"
    if solution.one_more_bytes is None:
        return f"{value}, the most this program takes"
    over = solution.one_more_bytes - solution.device_bytes
    return f"{value}; {solution.value + 1:,} would take {amount(over)} more than {found.options.device} has"


def _sequences(count: int) -> str:
    return f"{count:,} sequence{'' if count == 1 else 's'}"
