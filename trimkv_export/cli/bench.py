"""`trimkv-export bench`."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from trimkv_export.backends.process_memory import status_bytes
from trimkv_export.cli.console import json_option, note, print_json, print_table, provider_option, token_progress
from trimkv_export.errors import PackageError
from trimkv_export.plan.check import compare, describe, planned, require
from trimkv_export.runtime import Engine, Session
from trimkv_export.words import amount

__all__ = ["command"]

EPILOG = """\b
Examples:
  trimkv-export bench PACKAGE
  trimkv-export bench PACKAGE --prompt-tokens 32768 --new-tokens 256 --threads 4
  trimkv-export bench PACKAGE --batch 16 --json
  trimkv-export bench PACKAGE --provider cuda --check-plan
"""
SEED = 0


@click.command("bench", epilog=EPILOG)
@click.argument("package", type=click.Path(path_type=Path))
@click.option("--prompt-tokens", type=click.IntRange(1), default=512, show_default=True, help="Tokens of each prompt.")
@click.option(
    "--new-tokens", type=click.IntRange(1), default=128, show_default=True, help="Tokens after it, one at a time."
)
@click.option(
    "--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences: read in turn, decoded together."
)
@click.option("--repeat", type=click.IntRange(1), default=3, show_default=True, help="Measure so many times.")
@click.option("--warmup", type=click.IntRange(0), default=1, show_default=True, help="Runs before, which do not count.")
@click.option("--budget", type=int, help="Keep fewer entries than the package was built for.")
@click.option("--threads", type=int, help="Threads of a step. Default: one per core.")
@provider_option
@click.option(
    "--check-plan", is_flag=True, help="Compare memory with the package's plan at the end; fail if it took more."
)
@json_option
def command(
    package: Path,
    prompt_tokens: int,
    new_tokens: int,
    batch: int,
    repeat: int,
    warmup: int,
    budget: int | None,
    threads: int | None,
    provider: str,
    check_plan: bool,
    as_json: bool,
) -> None:
    """Measure the speed and the memory of PACKAGE on random tokens.

    Without tokenizing, sampling and the vision tower. The first of the new tokens is the prompt's own result.
    """
    with Engine.open(package, provider, threads=threads, max_sessions=batch, vision=False) as engine:
        plan = planned(engine.package, provider, batch) if check_plan else None  # fails before minutes of measuring
        with contextlib.suppress(PackageError):
            engine.tokenizer  # noqa: B018 (memory is then that of a run)
        sessions = [engine.session(budget) for _ in range(batch)]
        total, fed = (warmup + repeat) * batch * (prompt_tokens + new_tokens - 1), 0
        prompts: list[float] = []
        steps: list[float] = []
        with token_progress("measuring") as progress:

            def advance(count: int) -> None:
                nonlocal fed
                fed += count
                progress(fed, total)

            for index in range(warmup + repeat):
                if index == warmup:
                    prompts, steps = [], []
                _measure(engine, sessions, prompt_tokens, new_tokens, prompts, steps, advance)
        report: dict[str, Any] = {
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "batch": batch,
            "budget": sessions[0].budget,
            "provider": provider,
            "native": engine.native,
            "prefill_tokens_per_second": len(prompts) * prompt_tokens / sum(prompts),
            "time_to_first_token_seconds": _percentiles(prompts),
            "decode_tokens_per_second": batch * len(steps) / sum(steps) if steps else None,
            "inter_token_seconds": _percentiles(steps) if steps else None,
            "evictions": sessions[0].evictions,
            "cache_bytes": engine.cache_bytes,
            "peak_resident_bytes": status_bytes("VmHWM"),
        }
        if plan:
            report["plan"] = compare(plan, engine.cache_bytes, vision=False, provider=provider)
    if as_json:
        print_json(report)
    else:
        print_table(str(package), _rows(report))
    if plan:
        note(describe(report["plan"]))
        require(report["plan"])


def _measure(
    engine: Engine,
    sessions: list[Session],
    prompt_tokens: int,
    new_tokens: int,
    prompts: list[float],
    steps: list[float],
    advance: Callable[[int], None],
) -> None:
    """One run: adds the seconds of each prompt and of each decode step, all sequences in one."""
    draw, chunk, model = np.random.default_rng(SEED), engine.config.prefill_chunk, engine.config.model
    pictures = engine.config.placeholder_ids

    def token() -> int:
        while (drawn := int(draw.integers(model.vocab_size))) in pictures:  # it would need one
            pass
        return drawn

    for session in sessions:
        session.reset()
        seconds = 0.0
        for start in range(0, prompt_tokens, chunk):
            tokens = [token() for _ in range(min(chunk, prompt_tokens - start))]
            started = time.perf_counter()
            session.step(tokens)
            seconds += time.perf_counter() - started
            advance(len(tokens))
        prompts.append(seconds)
    for _ in range(new_tokens - 1):
        work = [(session, [token()]) for session in sessions]
        started = time.perf_counter()
        engine.step_many(work)
        steps.append(time.perf_counter() - started)
        advance(len(work))


def _percentiles(seconds: list[float]) -> dict[str, float]:
    return {f"p{percent}": float(np.percentile(seconds, percent)) for percent in (50, 99)}


def _rows(report: dict[str, Any]) -> dict[str, str]:
    """The report for a person."""
    first, between = report["time_to_first_token_seconds"], report["inter_token_seconds"]
    kernels = "native kernels" if report["native"] else "portable bodies"
    rows = {
        "run": f"{report['batch']} x {report['prompt_tokens']:,} + {report['new_tokens']:,} tokens, budget "
        f"{report['budget']}, {report['evictions']:,} evictions; {report['provider']}, {kernels}",
        "prefill": f"{report['prefill_tokens_per_second']:,.1f} tokens/s",
        "time to first token": f"{first['p50'] * 1e3:,.1f} ms (p99 {first['p99'] * 1e3:,.1f})",
    }
    if between:
        rows["decode"] = f"{report['decode_tokens_per_second']:,.1f} tokens/s"
        rows["between tokens"] = f"{between['p50'] * 1e3:,.2f} ms (p99 {between['p99'] * 1e3:,.2f})"
    rows["cache"] = amount(report["cache_bytes"])
    rows["peak memory"] = f"{amount(report['peak_resident_bytes'])} resident"
    return rows
