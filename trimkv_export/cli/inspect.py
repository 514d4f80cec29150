"""`trimkv-export inspect`."""

from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from trimkv_export.cli.console import (
    check_fps,
    json_option,
    print_json,
    print_table,
    prompt_options,
    read_prompt,
    token_progress,
)
from trimkv_export.errors import MissingDependencyError, OptionError, OutputError
from trimkv_export.package import Package, QuantizationMethod, VisionInfo
from trimkv_export.vision.reader import Video
from trimkv_export.words import amount

__all__ = ["command"]

EPILOG = """\b
Examples:
  trimkv-export inspect PACKAGE
  trimkv-export inspect PACKAGE --kept kept.png --prompt-file long.txt
  trimkv-export inspect PACKAGE --kept kept.png --image photo.jpg --prompt "What is on the left?"
"""


@click.command("inspect", epilog=EPILOG)
@click.argument("package", type=click.Path(path_type=Path))
@click.option(
    "--kept", type=click.Path(path_type=Path), help="Feed the prompt and draw what the cache keeps: a PNG file."
)
@prompt_options
@click.option("--budget", type=int, help="With --kept: keep fewer entries than the package was built for.")
@json_option
def command(
    package: Path,
    kept: Path | None,
    prompt: str | None,
    prompt_file: Path | None,
    chat: bool,
    images: tuple[Path, ...],
    videos: tuple[Path, ...],
    fps: float | None,
    budget: int | None,
    as_json: bool,
) -> None:
    """Show what is in PACKAGE; with --kept, what its cache keeps of a prompt, and of its pictures."""
    check_fps(fps, videos)
    if kept is not None:
        clips = [Video(video, fps) for video in videos]
        _kept(package, kept, read_prompt(prompt, prompt_file), chat, images, clips, budget, as_json)
        return
    if prompt is not None or prompt_file is not None or images or videos:
        raise OptionError("a prompt goes with --kept FILE.png")
    config = Package.open(package).config
    report = config.as_dict()
    if as_json:
        print_json(report)
        return
    model, eviction, cache = config.model, config.eviction, config.cache
    print_table(
        str(package),
        {
            "model": f"{model.model_type}: {model.num_layers} layers, {model.num_heads} heads, {model.num_kv_heads} KV "
            f"heads of {model.head_dim}, vocabulary {model.vocab_size:,}",
            "source": f"{config.source['model']} with gates {config.source['gates']} ({model.gate_kind}, "
            f"trained with a budget of {config.source['trained_budget']})",
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
        return "rounded to nearest" if method.name == "rtn" else method.name
    return f"{method.name}, calibrated on {method.text_tokens:,} tokens of a text of sha256 {method.text_sha256[:12]}…"


def _vision_row(vision: VisionInfo) -> str:
    images = f"at most {vision.max_image_tokens:,} tokens"
    if vision.image_size is not None:
        images = f"{vision.image_size} x {vision.image_size} pixels"
    return f"{vision.depth} blocks of {vision.hidden_size}, {amount(vision.weight_bytes)}; images of {images}"


def _kept(
    package: Path,
    picture: Path,
    text: str,
    chat: bool,
    images: tuple[Path, ...],
    videos: list[Video],
    budget: int | None,
    as_json: bool,
) -> None:
    from trimkv_export.runtime import Engine
    from trimkv_export.runtime.prompts import encode_prompt

    try:
        from trimkv_export.cli.plots.kept import draw_kept, draw_pictures
    except ImportError:
        raise MissingDependencyError(
            "--kept draws with matplotlib; install it with: pip install 'trimkv-export[plot]'"
        ) from None
    seeing = bool(images or videos)
    with Engine.open(package, vision=seeing) as engine, engine.session(budget) as session:
        prompt = encode_prompt(engine, text, chat=chat, images=images, videos=videos)
        with token_progress() as progress:
            session.prefill(prompt, progress=progress)
        kept, cache, seen = session.kept(), engine.config.cache, session.tokens_seen
        evictions, cache_bytes = session.evictions, engine.cache_bytes
    try:
        over_pictures = picture.with_name(f"{picture.stem}-images{picture.suffix}") if seeing else None
        draw_kept(kept, replace(cache, budget=session.budget), seen, picture)
        if over_pictures:
            draw_pictures(kept, cache, prompt, over_pictures)
    except (OSError, ValueError) as error:
        raise OutputError(f"{picture}: the picture cannot be written: {error}") from None
    per_stream = np.bincount(kept[:, 0] * cache.num_kv_heads + kept[:, 1], minlength=cache.num_streams)
    report = {
        "tokens": seen,
        "entries_kept": len(kept),
        "share_kept": len(kept) / (seen * cache.num_streams),
        "evictions": evictions,
        "cache_bytes": cache_bytes,
        "full_cache_bytes": cache.full_cache_nbytes(seen),
        "kept_per_head": per_stream.reshape(cache.num_layers, cache.num_kv_heads).tolist(),
        "picture": str(picture),
        **({"over_pictures": str(over_pictures)} if over_pictures else {}),
    }
    if as_json:
        print_json(report)
        return
    print_table(
        f"What {package} keeps",
        {
            "tokens": f"{seen:,}",
            "entries kept": f"{len(kept):,} of {seen * cache.num_streams:,} ({report['share_kept']:.2%}), "
            f"{per_stream.min()} to {per_stream.max()} a head",
            "cache": f"{amount(cache_bytes)}; a full cache would take {amount(cache.full_cache_nbytes(seen))}",
            "picture": str(picture),
            **({"over the pictures": str(over_pictures)} if over_pictures else {}),
        },
    )
