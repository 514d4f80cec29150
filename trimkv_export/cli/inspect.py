"""`trimkv-export inspect`."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from trimkv_export.cli.console import json_option, print_json, print_table, token_progress
from trimkv_export.cli.plots import load_plots
from trimkv_export.cli.prompts import PromptOptions, prompt_options
from trimkv_export.cli.usage import FILE
from trimkv_export.errors import OptionError
from trimkv_export.files import require_writable
from trimkv_export.package import Package, QuantizationMethod, VisionInfo
from trimkv_export.text.tokenizer import Tokenizer
from trimkv_export.words import amount, shorten

__all__ = ["command"]

EPILOG = """\b
Examples:
  trimkv-export inspect PACKAGE
  trimkv-export inspect PACKAGE --kept kept.png --prompt-file long.txt
  trimkv-export inspect PACKAGE --kept kept.png --prompt-file a.txt --mark Paris
  trimkv-export inspect PACKAGE --kept kept.png --image photo.jpg --prompt "What is on the left?"
"""


@click.command("inspect", epilog=EPILOG)
@click.argument("package", type=FILE)
@click.option("--kept", type=FILE, help="Feed the prompt, and draw what the cache keeps of it: a PNG file.")
@prompt_options
@click.option("--budget", type=int, help="With --kept: keep fewer entries than the package was built for.")
@click.option("--mark", help="With --kept: mark where this regular expression matches the prompt.")
@json_option
def command(package: Path, kept: Path | None, as_json: bool, **others: Any) -> None:
    """Show what is in PACKAGE; with --kept, what its cache keeps of a prompt, and of its pictures."""
    given = [name for name, value in others.items() if value is not None and value is not False and value != ()]
    asked = PromptOptions.take(others)
    if kept is not None:
        _kept(package, kept, asked, as_json=as_json, **others)
        return
    if given:
        raise OptionError(f"--{given[0].removesuffix('s').replace('_', '-')} goes with --kept FILE.png")
    config = Package.open(package).config
    report = config.as_dict()
    if as_json:
        print_json(report)
        return
    model, eviction, cache = config.model, config.eviction, config.cache
    said = {name: config.source.get(name, "?") for name in ("model", "gates", "trained_budget")}
    print_table(
        str(package),
        {
            "model": f"{model.model_type}: {model.num_layers} layers, {model.num_heads} heads, {model.num_kv_heads} KV "
            f"heads of {model.head_dim}, vocabulary {model.vocab_size:,}",
            "source": f"{said['model']} with gates {said['gates']} ({model.gate_kind}, trained with a budget of "
            f"{said['trained_budget']})",
            "precision": config.numbers,
            **({"quantised": _method_row(config.quantization_method)} if config.quantization_method else {}),
            "policy": f"{eviction.policy}, budget {eviction.budget}, evict every {eviction.evict_every} tokens, "
            f"{eviction.min_tokens_per_head} at least per head, lookahead {eviction.lookahead_steps}",
            "prefill chunk": f"{config.prefill_chunk} tokens",
            **({"vision": _vision_row(config.vision)} if config.vision else {}),
            "weights": amount(config.weight_bytes),
            "cache": f"{amount(report['cache_bytes'])} for each sequence: {cache.num_slots:,} entries for "
            f"{cache.num_streams} heads, and {cache.evict_every} recent tokens",
            **({"device": f"held to the plan for {config.device}"} if config.device else {}),
            "built by": ", ".join(f"{name} {version}" for name, version in config.producer.items()),
            "files": "\n".join(f"{name}  {amount(entry['bytes'])}" for name, entry in config.files.items()),
        },
    )


def _method_row(method: QuantizationMethod) -> str:
    if method.text_tokens is None or method.text_sha256 is None:
        return {"rtn": "rounded to nearest", "least-squares": "rounded by least squares"}.get(method.name, method.name)
    return f"{method.name}, calibrated on {method.text_tokens:,} tokens of a text of sha256 {method.text_sha256[:12]}…"


def _vision_row(vision: VisionInfo) -> str:
    images = f"at most {vision.max_image_tokens:,} tokens"
    if vision.image_size is not None:
        images = f"{vision.image_size} x {vision.image_size} pixels"
    return f"{vision.depth} blocks of {vision.hidden_size}, {amount(vision.weight_bytes)}; images of {images}"


def _kept(
    package: Path,
    picture: Path,
    asked: PromptOptions,
    *,
    budget: int | None,
    mark: str | None,
    as_json: bool,
) -> None:
    from trimkv_export.runtime import Engine
    from trimkv_export.runtime.session import MAX_TOKENS

    plots = load_plots("kept", "--kept", picture)
    over_pictures = picture.with_name(f"{picture.stem}-images{picture.suffix}") if asked.seeing else None
    if over_pictures:
        require_writable(over_pictures)
    prompt, pattern = asked.read(), None if mark is None else _pattern(mark)
    with (
        Engine.open(
            package, vision=asked.seeing, context=MAX_TOKENS, max_image_pixels=asked.max_image_pixels
        ) as engine,
        engine.session(budget) as session,
    ):
        read = prompt.encode(engine)
        marks = [] if pattern is None else _places(engine.tokenizer, read.tokens, pattern)
        with token_progress() as progress:
            session.prefill(read, progress=progress)
        kept, cache, seen = session.kept(), engine.config.cache, session.tokens_seen
        evictions, cache_bytes = session.evictions, engine.cache_bytes
    plots.draw_kept(kept, replace(cache, budget=session.budget), seen, picture, marks)
    if over_pictures:
        plots.draw_pictures(kept, cache, read, over_pictures)
    per_stream = np.bincount(kept[:, 0] * cache.num_kv_heads + kept[:, 1], minlength=cache.num_streams)
    report: dict[str, Any] = {
        "tokens": seen,
        "entries_kept": len(kept),
        "share_kept": len(kept) / (seen * cache.num_streams),
        "evictions": evictions,
        "cache_bytes": cache_bytes,
        "full_cache_bytes": cache.full_cache_nbytes(seen),
        "kept_per_head": per_stream.reshape(cache.num_layers, cache.num_kv_heads).tolist(),
        "picture": str(picture),
    }
    rows = {
        "tokens": f"{seen:,}",
        "entries kept": f"{len(kept):,} of {seen * cache.num_streams:,} ({report['share_kept']:.2%}), "
        f"{per_stream.min()} to {per_stream.max()} a head",
    }
    if marks:
        positions = np.concatenate([np.arange(start, end) for start, end in marks])
        share = np.isin(kept[:, 2], positions).sum() / (len(positions) * cache.num_streams)
        report |= {"marked": marks, "marked_share_kept": share}
        rows["marked text"] = f"{len(marks):,} places of {len(positions):,} tokens, {share:.2%} of their entries kept"
    rows["cache"] = f"{amount(cache_bytes)}; a full cache would take {amount(cache.full_cache_nbytes(seen))}"
    rows["picture"] = str(picture)
    if over_pictures:
        report["over_pictures"] = rows["over the pictures"] = str(over_pictures)
    if as_json:
        print_json(report)
    else:
        print_table(f"What {package} keeps", rows)


def _pattern(mark: str) -> re.Pattern[str]:
    try:
        return re.compile(mark)
    except (re.error, OverflowError, RecursionError) as error:
        raise OptionError(f"--mark {shorten(mark)} is not a regular expression: {error}") from None


def _places(tokenizer: Tokenizer, tokens: Sequence[int], pattern: re.Pattern[str]) -> list[tuple[int, int]]:
    """The tokens of each match, from the first to after the last. Raises OptionError where there is none."""
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in tokens]
    ends = np.cumsum([len(piece) for piece in pieces])
    # A token's text is from the end of the token before to its own; a character of several tokens is its last one's.
    places = [
        (int(np.searchsorted(ends, match.start(), "right")), int(np.searchsorted(ends, match.end(), "left")) + 1)
        for match in pattern.finditer("".join(pieces))
        if match.group()
    ]
    if not places:
        raise OptionError(f"--mark {shorten(pattern.pattern)} matches nothing in the prompt")
    return places
