"""`trimkv-export bench`."""

from pathlib import Path
from typing import Any

import click

from trimkv_export.cli.console import (
    budget_option,
    check_plan_option,
    json_option,
    note,
    note_portable,
    print_json,
    print_table,
    provider_option,
    threads_option,
    token_progress,
    trust_option,
)
from trimkv_export.cli.usage import FILE
from trimkv_export.evaluation.bench import BenchReport, measure
from trimkv_export.plan.check import describe, require
from trimkv_export.words import amount

__all__ = ["command"]

EPILOG = """\b
Examples:
  trimkv-export bench PACKAGE
  trimkv-export bench PACKAGE --prompt-tokens 32768 --new-tokens 256 --threads 4
  trimkv-export bench PACKAGE --batch 16 --json
  trimkv-export bench PACKAGE --provider cuda --check-plan
"""
SOME = click.IntRange(1)


@click.command("bench", epilog=EPILOG)
@click.argument("package", type=FILE)
@click.option("--prompt-tokens", type=SOME, default=512, show_default=True, help="Tokens of each prompt.")
@click.option(
    "--new-tokens", type=SOME, default=128, show_default=True, help="Tokens after each prompt, fed one at a time."
)
@click.option("--batch", type=SOME, default=1, show_default=True, help="Sequences: read one by one, decoded together.")
@click.option("--repeat", type=SOME, default=3, show_default=True, help="Runs that are measured.")
@click.option(
    "--warmup", type=click.IntRange(0), default=1, show_default=True, help="Runs before those, which do not count."
)
@budget_option
@threads_option
@provider_option
@trust_option
@check_plan_option
@json_option
def command(package: Path, as_json: bool, **options: Any) -> None:
    """Measure the speed and the memory of PACKAGE on random tokens.

    Tokenizing, sampling and the vision tower are left out. The first of the new tokens is the prompt's own result.
    """
    with token_progress("measuring") as progress:
        report = measure(package, **options, progress=progress)
    note_portable(report.native)
    if as_json:
        print_json(report.as_dict())
    else:
        print_table(str(package), _rows(report))
    if report.plan:
        note(describe(report.plan))
        require(report.plan)


def _rows(report: BenchReport) -> dict[str, str]:
    """The report for a person."""
    values = report.as_dict()
    first, between = values["time_to_first_token_seconds"], values["inter_token_seconds"]
    kernels = "native kernels" if report.native else "portable bodies"
    rows = {
        "run": f"{report.batch} x {report.prompt_tokens:,} + {report.new_tokens:,} tokens, budget {report.budget}, "
        f"{report.evictions:,} evictions; {report.provider}, {kernels}",
        "prefill": f"{values['prefill_tokens_per_second']:,.1f} tokens/s",
        "time to first token": f"{first['p50'] * 1e3:,.1f} ms (p99 {first['p99'] * 1e3:,.1f})",
    }
    if between:
        rows["decode"] = f"{values['decode_tokens_per_second']:,.1f} tokens/s"
        rows["between tokens"] = f"{between['p50'] * 1e3:,.2f} ms (p99 {between['p99'] * 1e3:,.2f})"
    rows["cache"] = amount(report.cache_bytes)
    rows["peak memory"] = f"{amount(report.peak_resident_bytes)} resident"
    return rows
