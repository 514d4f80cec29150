"""`trimkv-export build`."""

import re
from pathlib import Path
from typing import Any

import click

from trimkv_export.cli.console import build_progress, json_option, note, print_json, print_table
from trimkv_export.cli.options import Command, list_options, print_lists, recipe_option, table_options, values_of
from trimkv_export.config import BuildOptions
from trimkv_export.errors import OptionError, missing
from trimkv_export.words import amount

__all__ = ["command"]

EPILOG = """\b
Examples:
  trimkv-export build --model qwen3-4b --budget 256
  trimkv-export build --model Qwen/Qwen3-4B --gates ngocbh/DBTrimKV-Qwen3-4B-Math --budget 128
  trimkv-export build --model qwen3-vl-4b --budget 256 --max-image-tokens 512
  trimkv-export build --model qwen3-4b --budget 512 --precision fp16 --device l4 --max-batch 16
  trimkv-export build --model qwen3-1.7b --budget 512 --precision fp16 --target tensorrt
  trimkv-export build --model qwen3-4b --budget 256 --precision int4 --calibrate articles.txt
  trimkv-export build --recipe qwen3-8b-l4 --output my-package
  trimkv-export build --model ./base --gates ./gates --budget 64 --weights link --output my-package
"""


@click.command("build", cls=Command, epilog=EPILOG)
@recipe_option
@table_options(BuildOptions)
@list_options
@json_option
def command(as_json: bool, **values: Any) -> None:
    """Build a package: decoder graph, weights, tokenizer and memory plan in one folder.

    The cache is sized by --budget here, once; no prompt can make it grow. Weights are streamed: building a model takes
    a few hundred MB of memory, whatever its size.
    """
    if print_lists(values, as_json):
        return
    values = values_of(values)
    if values["budget"] is None:
        raise OptionError("there is no budget: give --budget, or a --recipe that says it")
    if values["output"] is None:
        values["output"] = Path(f"{_short_name(values['model'])}-m{values['budget']}")
    options = BuildOptions(**values)
    try:
        from trimkv_export.build.builder import build_package
    except ImportError as error:
        raise missing("building", str(error.name), "export") from None
    with build_progress() as progress:
        report = build_package(options, progress, tell=lambda text: note(f"note: {text}")).as_dict()
    if as_json:
        print_json(report)
        return
    eviction = report["eviction"]
    device = {"device": f"fits {report['device']}, see memory_plan.json"} if report["device"] else {}
    rows = {
        "model": f"{report['model_type']}, {report['gate_kind']} gates, {report['numbers']}",
        "policy": f"{eviction['policy']}, budget {eviction['budget']}, evict every {eviction['evict_every']} tokens",
        "package": amount(report["package_bytes"]),
        "weights": amount(report["weight_bytes"]),
        "cache": f"{amount(report['cache_bytes'])} for each sequence, at any context length",
        "full cache": f"{amount(report['full_cache_bytes'])} at {report['full_cache_context']:,} tokens, "
        f"{report['full_cache_bytes'] / report['cache_bytes']:.0f} times as much",
        **device,
        **({"engine": ", ".join(report["engines"])} if report["engines"] else {}),
        "next": f"trimkv-export run {report['package']} --prompt TEXT",
    }
    print_table(f"Built {report['package']}", rows)


def _short_name(model: str) -> str:
    name = Path(model).resolve().name if Path(model).is_dir() else model.rsplit("/", 1)[-1]
    return re.sub(r"[^\w.-]+", "-", name).lower() or "model"
