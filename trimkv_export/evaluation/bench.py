"""Speed and memory of a package on random tokens."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trimkv_export.backends.process_memory import status_bytes
from trimkv_export.checks import require_whole
from trimkv_export.errors import PackageError
from trimkv_export.package import PackageConfig
from trimkv_export.plan.check import compare, planned
from trimkv_export.runtime import Engine, Session
from trimkv_export.runtime.session import MAX_TOKENS

__all__ = ["BenchReport", "measure"]

SEED = 0

# (tokens fed, tokens in all)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class BenchReport:
    """What `measure` found.

    Attributes:
        prompt_tokens: tokens of each prompt.
        new_tokens: tokens after it; the first of them is the prompt's own result.
        batch: sequences; their prompts are read in turn, and they are decoded together.
        budget: entries kept per layer and KV head, on average.
        provider: where the model ran.
        native: whether native kernels ran, not the portable bodies.
        prompt_seconds: of each prompt.
        step_seconds: of each decode step of all sequences; none if `new_tokens` is 1.
        evictions: of one sequence in one run.
        cache_bytes: the allocated cache slab of all sequences.
        peak_resident_bytes: the most memory of this process so far.
        plan: comparison with the package's plan, as `plan.check.compare` makes it; None if it was not asked for.
    """

    prompt_tokens: int
    new_tokens: int
    batch: int
    budget: int
    provider: str
    native: bool
    prompt_seconds: Sequence[float]
    step_seconds: Sequence[float]
    evictions: int
    cache_bytes: int
    peak_resident_bytes: int
    plan: dict[str, Any] | None

    def as_dict(self) -> dict[str, Any]:
        """For `bench --json`: rates and percentiles in place of the single times."""
        prompts, steps = self.prompt_seconds, self.step_seconds
        report: dict[str, Any] = {
            name: value for name, value in vars(self).items() if name not in ("prompt_seconds", "step_seconds", "plan")
        }
        return report | {
            "prefill_tokens_per_second": len(prompts) * self.prompt_tokens / sum(prompts),
            "time_to_first_token_seconds": _percentiles(prompts),
            "decode_tokens_per_second": self.batch * len(steps) / sum(steps) if steps else None,
            "inter_token_seconds": _percentiles(steps) if steps else None,
            **({"plan": self.plan} if self.plan else {}),
        }


def measure(
    path: Path | str,
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 128,
    batch: int = 1,
    repeat: int = 3,
    warmup: int = 1,
    budget: int | None = None,
    threads: int | None = None,
    provider: str = "cpu",
    trust_package_plugin: bool = False,
    check_plan: bool = False,
    progress: Progress = lambda *_: None,
) -> BenchReport:
    """Measure a package on random tokens, without tokenizing, sampling and the vision tower.

    Args:
        path: the package.
        prompt_tokens: tokens of each prompt.
        new_tokens: tokens after it, fed one at a time.
        batch: sequences that are decoded together.
        repeat: runs that are measured.
        warmup: runs before those, which do not count.
        budget: of the sessions; None is the package's.
        threads: as for `Engine.open`.
        provider: as for `Engine.open`.
        trust_package_plugin: as for `Engine.open`.
        check_plan: compare the memory with the package's plan.
        progress: called after each step with the tokens fed so far and in all.

    Raises:
        OptionError: a count is not a whole number, or is too small.
        PackageError: with `check_plan`, the package has no plan to compare with.
        TrimKVError: as `Engine.open`.
    """
    for name, count, least in (
        ("prompt-tokens", prompt_tokens, 1),
        ("new-tokens", new_tokens, 1),
        ("batch", batch, 1),
        ("repeat", repeat, 1),
        ("warmup", warmup, 0),
    ):
        require_whole(name, count, least, MAX_TOKENS)
    with Engine.open(
        path,
        provider,
        threads=threads,
        context=MAX_TOKENS,
        max_sessions=batch,
        vision=False,
        trust_package_plugin=trust_package_plugin,
    ) as engine:
        plan = planned(engine.package, provider, batch) if check_plan else None  # fails before minutes of measuring
        with contextlib.suppress(PackageError):
            engine.tokenizer  # noqa: B018 (the memory is then that of a run)
        sessions = [engine.session(budget) for _ in range(batch)]
        total, fed = (warmup + repeat) * batch * (prompt_tokens + new_tokens - 1), 0
        prompts: list[float] = []
        steps: list[float] = []

        def advance(count: int) -> None:
            nonlocal fed
            fed += count
            progress(fed, total)

        for run in range(warmup + repeat):
            if run == warmup:
                prompts.clear()
                steps.clear()
            _run(engine, sessions, prompt_tokens, new_tokens, prompts, steps, advance)
        return BenchReport(
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            batch=batch,
            budget=sessions[0].budget,
            provider=provider,
            native=engine.native,
            prompt_seconds=prompts,
            step_seconds=steps,
            evictions=sessions[0].evictions,
            cache_bytes=engine.cache_bytes,
            peak_resident_bytes=status_bytes("VmHWM"),
            plan=compare(plan, engine.cache_bytes, vision=False, provider=provider) if plan else None,
        )


def _run(
    engine: Engine,
    sessions: Sequence[Session],
    prompt_tokens: int,
    new_tokens: int,
    prompts: list[float],
    steps: list[float],
    advance: Callable[[int], None],
) -> None:
    """One run; adds the seconds of each prompt, and of each decode step of all sequences."""
    chunk, tokens = engine.config.prefill_chunk, _random_tokens(engine.config)
    for session in sessions:
        session.reset()
        seconds = 0.0
        for start in range(0, prompt_tokens, chunk):
            part = [next(tokens) for _ in range(min(chunk, prompt_tokens - start))]
            started = time.perf_counter()
            session.step(part)
            seconds += time.perf_counter() - started
            advance(len(part))
        prompts.append(seconds)
    for _ in range(new_tokens - 1):
        work = [(session, [next(tokens)]) for session in sessions]
        started = time.perf_counter()
        engine.step_many(work)
        steps.append(time.perf_counter() - started)
        advance(len(work))


def _random_tokens(config: PackageConfig) -> Iterator[int]:
    """The same ones each time; none stands for a picture, since it would need one."""
    draw = np.random.default_rng(SEED)
    while True:
        if (token := int(draw.integers(config.model.vocab_size))) not in config.placeholder_ids:
            yield token


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    return {f"p{percent}": float(np.percentile(seconds, percent)) for percent in (50, 99)}
