"""`trimkv-export build`."""

import re
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from trimkv_export.build.recipe import read_recipe
from trimkv_export.cli.console import build_progress, json_option, number_options, print_json, print_table
from trimkv_export.config import BuildOptions, EngineWeights, Recipe, Target, WeightStorage
from trimkv_export.errors import MissingDependencyError
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
  trimkv-export build --recipe engines/qwen3-8b-l4.yaml --output my-package
  trimkv-export build --model ./base --gates ./gates --budget 64 --weights link --output my-package
"""


@click.command("build", epilog=EPILOG)
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    help="A YAML file of these options, such as those in engines/; what is given beside it wins.",
)
@click.option("--model", help="Alias (qwen3-4b), hub id (owner/name) or folder of the backbone.")
@click.option("--gates", help="Alias, hub id or folder of the retention gates. Default: those of the alias.")
@click.option("--budget", type=int, help="M: entries kept per layer and KV head, on average.")
@click.option("--evict-every", default=32, show_default=True, help="b: tokens that come in between two evictions.")
@click.option("--prefill-chunk", default=256, show_default=True, help="C: most tokens that one step takes.")
@click.option(
    "--max-image-tokens", default=1024, show_default=True, help="Most tokens of one image; larger ones are scaled down."
)
@number_options
@click.option("--policy", help="global or per_head. Default: the one the gates were trained for.")
@click.option(
    "--min-tokens-per-head", default=0, show_default=True, help="Entries each head keeps beyond those it won."
)
@click.option(
    "--lookahead-steps", default=1, show_default=True, help="Score entries by their use over this many tokens."
)
@click.option(
    "--weights",
    type=click.Choice([str(w) for w in WeightStorage]),
    default="copy",
    show_default=True,
    help="Copy checkpoint files that need no conversion, or hard-link them.",
)
@click.option(
    "--device", help="Refuse to build what does not fit this device: orin-nano-8gb, l4, h100, …; cpu: this machine now."
)
@click.option(
    "--max-batch",
    default=1,
    show_default=True,
    help="Sequences at a time that must fit the --device, and that a TensorRT engine takes.",
)
@click.option("--context", type=int, help="Longest context to serve, in tokens. Default: what the model was made for.")
@click.option("--revision", help="Branch, tag or commit of the backbone on the hub.")
@click.option(
    "--target",
    type=click.Choice([str(t) for t in Target]),
    default="onnxruntime",
    show_default=True,
    help="Add TensorRT engines for the GPU of this machine; with tensorrt-llm also its engine folder; with "
    "tensorrt-rtx one for the vision tower alone.",
)
@click.option(
    "--engine-weights",
    type=click.Choice([str(w) for w in EngineWeights]),
    default="included",
    show_default=True,
    help="In a TensorRT engine; or stripped, taken from the package when it is opened; or streamed to the GPU.",
)
@click.option(
    "--timing-cache", type=click.Path(path_type=Path), help="A file of TensorRT's measurements, read and written."
)
@click.option(
    "--calibrate",
    type=click.Path(path_type=Path),
    help="int4, int8: round weights with regard to the model's activations (AWQ) on this text, a UTF-8 file like what "
    "it will read, of some thousand words.",
)
@click.option("--output", type=click.Path(path_type=Path), help="The package folder. Default: NAME-mBUDGET.")
@click.option("--overwrite", is_flag=True, help="Replace a package that is there already.")
@json_option
def command(as_json: bool, recipe: Path | None, **values: Any) -> None:
    """Build a package: decoder graph, weights, tokenizer and memory plan in one folder.

    The cache is sized by --budget here, once; no prompt can make it grow. Weights are streamed: building a model takes
    a few hundred MB of memory, whatever its size.
    """
    if recipe is not None:
        source = click.get_current_context().get_parameter_source
        given = {name for name in values if source(name) is not ParameterSource.DEFAULT}
        values |= _from_recipe(read_recipe(recipe), given)
    for name in ("model", "budget"):
        if values[name] is None:
            raise click.UsageError(f"there is no {name}: give --{name}, or a --recipe that says it")
    if values["output"] is None:
        values["output"] = Path(f"{_short_name(values['model'])}-m{values['budget']}")
    options = BuildOptions(**values)
    try:
        from trimkv_export.build.builder import build_package
    except ImportError as error:
        raise MissingDependencyError(
            f"building needs the package {error.name!r}; install it with: pip install 'trimkv-export[export]'"
        ) from None
    with build_progress() as progress:
        report = build_package(options, progress).as_dict()
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


def _from_recipe(recipe: Recipe, given: Collection[str]) -> dict[str, Any]:
    """The options that a recipe fills in: all but those given on the command line."""
    # Another model has other gates.
    fixed = {*given, "gates"} if "model" in given else given
    return {f.name: getattr(recipe, f.name) for f in fields(recipe) if f.name not in fixed}


def _short_name(model: str) -> str:
    name = Path(model).resolve().name if Path(model).is_dir() else model.rsplit("/", 1)[-1]
    return re.sub(r"[^\w.-]+", "-", name).lower() or "model"
