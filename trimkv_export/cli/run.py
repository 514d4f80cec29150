"""`trimkv-export run`."""

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from trimkv_export.checks import require_whole
from trimkv_export.cli.console import (
    SAMPLING,
    budget_option,
    check_plan_option,
    context_option,
    json_option,
    note,
    note_portable,
    print_json,
    provider_option,
    threads_option,
    token_progress,
    trust_option,
)
from trimkv_export.cli.prompts import PromptOptions, prompt_options
from trimkv_export.cli.usage import FILE
from trimkv_export.errors import OptionError
from trimkv_export.files import require_writable
from trimkv_export.plan.check import compare, describe, planned, require
from trimkv_export.runtime import Engine, SamplingOptions
from trimkv_export.words import amount, shorten

__all__ = ["command"]

EPILOG = """\b
Examples:
  trimkv-export run PACKAGE --prompt "Once upon a time"
  trimkv-export run PACKAGE --chat --prompt-file question.txt --temperature 0.7 --top-p 0.9
  cat long.txt | trimkv-export run PACKAGE --max-new-tokens 64 --save-session after.session
  trimkv-export run PACKAGE --session after.session --prompt "And then?"
  trimkv-export run PACKAGE --chat --system "Be brief." --no-thinking --prompt "Why is the sky blue?"
  trimkv-export run PACKAGE --chat --image photo.jpg --prompt "What is on the left?"
"""


@click.command("run", epilog=EPILOG)
@click.argument("package", type=FILE)
@prompt_options
@click.option("--max-new-tokens", default=256, show_default=True, help="Stop after this many tokens.")
@click.option("--temperature", default=0.0, show_default=True, help=SAMPLING["temperature"])
@click.option("--top-p", default=1.0, show_default=True, help=SAMPLING["top_p"])
@click.option("--top-k", default=0, show_default=True, help=SAMPLING["top_k"])
@click.option("--min-p", default=0.0, show_default=True, help=SAMPLING["min_p"])
@click.option("--repetition-penalty", default=1.0, show_default=True, help=SAMPLING["repetition_penalty"])
@click.option("--presence-penalty", default=0.0, show_default=True, help=SAMPLING["presence_penalty"])
@click.option("--frequency-penalty", default=0.0, show_default=True, help=SAMPLING["frequency_penalty"])
@click.option("--logit-bias", metavar="TOKEN=BIAS", multiple=True, help=SAMPLING["logit_bias"])
@click.option("--seed", type=int, help="Repeat the draws of an earlier run with this seed.")
@click.option(
    "--stop", "stops", multiple=True, help="End the answer before this text; a special token counts; repeatable."
)
@click.option(
    "--stop-token", "stop_tokens", type=int, multiple=True, help="End the answer at this token id; repeatable."
)
@click.option("--ignore-eos", is_flag=True, help="Do not end the answer at the model's own end tokens.")
@budget_option
@context_option
@threads_option
@provider_option
@trust_option
@click.option("--session", "session_file", type=FILE, help="Go on from a saved session.")
@click.option("--save-session", type=FILE, help="Save the session, prompt and answer included.")
@check_plan_option
@click.option("--stats", is_flag=True, help="Print token counts, speed and cache size to stderr at the end.")
@json_option
def command(
    package: Path,
    max_new_tokens: int,
    stops: tuple[str, ...],
    stop_tokens: tuple[int, ...],
    ignore_eos: bool,
    logit_bias: tuple[str, ...],
    budget: int | None,
    context: int | None,
    threads: int | None,
    provider: str,
    trust_package_plugin: bool,
    session_file: Path | None,
    save_session: Path | None,
    check_plan: bool,
    stats: bool,
    as_json: bool,
    **others: Any,
) -> None:
    """Generate text with PACKAGE, and print it as it comes.

    The cache keeps the size it was built with, however long the prompt is, up to the model's context. Pictures come
    before the prompt's text, unless the text says where they go, with the model's own placeholders, such as
    <|image_pad|> or <image>.
    """
    asked = PromptOptions.take(others)
    options = SamplingOptions(**others, logit_bias=_read_bias(logit_bias))
    if not all(stops):
        raise OptionError("--stop: the text is empty; leave it out")
    if session_file and budget is not None:
        raise OptionError("--budget is part of a saved session; leave it out with --session")
    prompt = asked.read()
    if save_session:
        require_writable(save_session)
    with Engine.open(
        package,
        provider,
        threads=threads,
        context=context,
        vision=asked.seeing,
        max_image_pixels=asked.max_image_pixels,
        trust_package_plugin=trust_package_plugin,
    ) as engine:
        note_portable(engine.native)
        plan = planned(engine.package, provider) if check_plan else None
        tokenizer, last = engine.tokenizer, engine.config.model.vocab_size - 1
        ends = frozenset(
            require_whole("--stop-token", token, 0, last, ", this model's tokens") for token in stop_tokens
        )
        ends |= frozenset() if ignore_eos else tokenizer.eos_ids
        with engine.restore(session_file) if session_file else engine.session(budget) as session:
            pending = session.pending  # of a session that was saved in the middle of an answer
            read = prompt.encode(engine, continued=session_file is not None, before=pending)
            _warn_beyond_training(engine, session.position_after(read) + max_new_tokens)
            # What a chat template is answered with is a text of its own; else it goes on with the prompt's.
            stream = tokenizer.stream(after=() if asked.chat else read.tokens, stop=stops)
            pieces, new = [], []

            def emit(piece: str) -> None:
                pieces.append(piece)
                if not as_json:
                    click.echo(piece, nl=False)

            started = time.perf_counter()
            with token_progress() as progress:
                generated = session.generate(read, max_new_tokens, options, stop_ids=ends, progress=progress)
                first = list(itertools.islice(generated, 1))
            prefilled = time.perf_counter()
            for token in itertools.chain(first, generated):
                new.append(token)
                emit(stream.push(token))
                if stream.stopped:
                    generated.close()
                    break
            emit(stream.flush())
            ended = time.perf_counter()
            finish_reason = "stop" if stream.stopped else session.finish_reason
            if not as_json:
                click.echo()
            if finish_reason == "length" and len(new) < max_new_tokens:
                note(f"note: the context of {engine.context:,} tokens is full; --context sets another")
            if save_session:
                if session.pending and session.next_position < engine.context:
                    session.step(session.pending)  # the last token is fed only when another one is asked for
                session.save(save_session)
            report: dict[str, Any] = {
                "text": "".join(pieces),
                "finish_reason": finish_reason,
                "prompt_tokens": len(read.tokens) - len(pending),
                "new_tokens": len(new),
                "tokens_seen": session.tokens_seen,
                "evictions": session.evictions,
                "prefill_seconds": prefilled - started,
                "decode_seconds": ended - prefilled,
                "cache_bytes": engine.cache_bytes,
                "native": engine.native,
                "threads": engine.threads,
            }
            if plan:
                seen = engine.vision is not None
                report["plan"] = compare(plan, engine.cache_bytes, vision=seen, provider=provider)
    if as_json:
        print_json(report)
    elif stats:
        decode = max(report["decode_seconds"], 1e-9)
        note(
            f"{report['prompt_tokens']:,} prompt tokens in {report['prefill_seconds']:.2f} s, {len(new):,} new tokens "
            f"at {max(len(new) - 1, 0) / decode:.1f} tokens/s, {report['evictions']:,} evictions, "
            f"cache {amount(report['cache_bytes'])}"
        )
    if plan:
        note(describe(report["plan"]))
        require(report["plan"])


def _warn_beyond_training(engine: Engine, wanted: int) -> None:
    trained, wanted = engine.config.model.max_position_embeddings, min(wanted, engine.context)
    if wanted > trained:
        note(f"warning: up to {wanted:,} positions, but the backbone was made for {trained:,}; quality may drop")


def _read_bias(given: Sequence[str]) -> dict[str, float]:
    """The values of --logit-bias; SamplingOptions checks tokens and ranges."""
    read: dict[str, float] = {}
    for text in given:
        token, _, bias = text.partition("=")
        try:
            number = float(bias)
        except ValueError:
            raise OptionError(f"--logit-bias takes TOKEN=BIAS, such as 42=-5; got {shorten(text)}") from None
        if token in read:
            raise OptionError(f"--logit-bias has the token {shorten(token)} twice; give it once")
        read[token] = number
    return read
