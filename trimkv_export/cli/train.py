"""`trimkv-export train`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trimkv_export.checkpoint.locate import locate_backbone
from trimkv_export.checks import require_whole
from trimkv_export.cli.console import json_option, note, print_json, print_table, step_progress
from trimkv_export.cli.usage import FILE, NamedOption
from trimkv_export.errors import missing
from trimkv_export.text.tokenizer import Tokenizer
from trimkv_export.training.options import KINDS, PRECISIONS, TrainingOptions
from trimkv_export.training.rows import Corpus

if TYPE_CHECKING:
    from trimkv_export.training.trainer import Report

__all__ = ["command"]

EPILOG = """\b
Examples:
  trimkv-export train --model Qwen/Qwen3-0.6B --text book.txt --budget 256 --steps 1000 --output gates
  trimkv-export train --model ./base --text a.txt --chat chats.jsonl --budget 256 --steps 400 --output gates
  trimkv-export train --model ./base --text book.txt --budget 256 --steps 1000 --output gates --resume
  trimkv-export build --model gates --budget 512
\b
A line of a chat file:
  {"messages": [{"role": "user", "content": "…"},
                {"role": "assistant", "content": "…"}]}
"""


def _tuned(name: str, help_text: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The option of a field of `TrainingOptions` that has a default, which says its type too."""
    default = getattr(TrainingOptions, name)
    flag = f"--{name.replace('_', '-')}"
    return click.option(flag, type=type(default), default=default, show_default=True, help=help_text)


@click.command("train", epilog=EPILOG)
@click.option(
    "--model", cls=NamedOption, required=True, help="Train gates for this backbone: an alias, a hub id or a folder."
)
@click.option("--text", "texts", type=FILE, multiple=True, help="Read this UTF-8 file; repeat it for more.")
@click.option(
    "--chat", "chats", type=FILE, multiple=True, help="Read the chats of this file, in JSON lines; repeat it for more."
)
@click.option("--output", type=FILE, required=True, help="Write the gates to this folder.")
@click.option(
    "--kind",
    type=click.Choice(KINDS),
    default="rg10",
    show_default=True,
    help="Train gates with one budget for all heads (rg10, DBTrimKV) or one for each (rg, TrimKV).",
)
@click.option(
    "--budget", type=int, required=True, help="Let each head retain this many tokens (M), on average with rg10."
)
@click.option("--steps", type=int, required=True, help="Update the gates so many times.")
@_tuned("context", "Read rows of so many tokens.")
@_tuned("rows", "Read so many rows in each step.")
@_tuned("width", "Give the gates this hidden width.")
@_tuned("positions", "Compare the predictions at so many random places of a row; 0 compares all.")
@_tuned(
    "learning_rate", "Learn at this rate, which rises over the first steps and falls to 0 over the last two thirds."
)
@_tuned(
    "bias", "With --start-rows 0, begin with this bias: the higher, the more is retained, and the slower gates learn."
)
@_tuned("capacity_weight", "Weigh the loss of what is retained beyond the budget so.")
@_tuned("chat_share", "Let this part of the rows be chats, where there are texts too.")
@_tuned("start_rows", "Before the first step, read so many rows and learn how long their tokens are attended to.")
@_tuned("seed", "Repeat the random choices.")
@click.option("--device", default="cpu", show_default=True, help="Train on this device, such as cuda or cuda:1.")
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default=TrainingOptions.precision,
    show_default=True,
    help="Multiply matrices in this type; auto takes bf16 where the processor has it.",
)
@click.option("--recompute", is_flag=True, help="Compute each layer twice to save memory: it takes a third more time.")
@click.option("--gates", "start", type=FILE, help="Begin with the gates of this folder instead of new ones.")
@click.option("--base-model", help="Let the gates name this backbone. Default: the hub id, or the path from OUTPUT.")
@click.option("--resume", is_flag=True, help="Go on where an earlier run of the same options stopped.")
@click.option("--save-every", type=int, default=20, show_default=True, help="Save the state after so many steps.")
@click.option("--overwrite", is_flag=True, help="Replace gates in OUTPUT that this command wrote.")
@json_option
def command(
    model: str,
    texts: tuple[Path, ...],
    chats: tuple[Path, ...],
    output: Path,
    device: str,
    base_model: str | None,
    start: Path | None,
    resume: bool,
    save_every: int,
    overwrite: bool,
    as_json: bool,
    **values: Any,
) -> None:
    """Train retention gates for a model that has none.

    The model stays as it is. Gates learn to give each token a retention with which the model predicts as with the full
    cache, while no more than --budget tokens a head are retained (TrimKV, DBTrimKV). OUTPUT has the layout of the
    official checkpoints; `build` takes it as --model or --gates. The state is kept in OUTPUT.training until the end.
    """
    options = TrainingOptions(**values)
    require_whole("save-every", save_every, 1)
    try:
        from trimkv_export.training.trainer import open_trainable, require_output, train
    except ImportError as error:
        raise missing("training", str(error.name), "train") from None
    require_output(output, resume=resume, overwrite=overwrite)
    folder, hub_id = locate_backbone(model)
    backbone, spec = open_trainable(folder, options)
    corpus = Corpus(Tokenizer.open(folder), texts, chats, options)
    if corpus.too_long:
        note(f"note: {corpus.too_long:,} of {corpus.chats:,} chats are longer than the context, and are left out")
    with step_progress() as progress:
        report = train(
            backbone,
            spec,
            corpus,
            options,
            output,
            base_model=base_model or hub_id,
            start=start,
            device=device,
            resume=resume,
            overwrite=overwrite,
            save_every=save_every,
            progress=progress,
        )
    if as_json:
        print_json(report.as_dict() | {"text_tokens": corpus.text_tokens, "chats": corpus.chats})
        return
    _print(report, options)


def _print(report: "Report", options: TrainingOptions) -> None:
    first = f", from step {report.resumed_from + 1:,}" if report.resumed_from else ""
    rows: Mapping[str, str] = {
        "gates": f"{options.kind}, {report.parameters:,} parameters, budget {options.budget}",
        "read": f"{report.tokens:,} tokens in {report.steps:,} steps{first}",
        "KL to the full cache": f"{report.kl:.4f} nats a token",
        "next-token loss": f"{report.next_token:.3f} nats a token",
        "capacity loss": f"{report.capacity:.4f}",
        "time": f"{report.seconds:,.0f} seconds, in {report.precision} on {report.device}",
        "next": f"trimkv-export build --model {report.output} --budget {options.budget}",
    }
    print_table(f"Trained {report.output}", rows)
