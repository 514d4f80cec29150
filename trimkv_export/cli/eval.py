"""`trimkv-export eval`."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from trimkv_export.cli.console import build_progress, json_option, print_columns, print_json, threads_option
from trimkv_export.cli.plots import load_plots
from trimkv_export.cli.usage import FILE
from trimkv_export.errors import OptionError
from trimkv_export.evaluation import EvaluatedPolicy, Result, Text, evaluate, read_tasks
from trimkv_export.files import read_text, require_writable, writable

__all__ = ["command"]

EPILOG = """\b
Examples:
  trimkv-export eval PACKAGE --task questions.jsonl
  trimkv-export eval PACKAGE --text book.txt --context 2048 --budget 64 --budget 256
  trimkv-export eval PACKAGE --task questions.jsonl --policy global --policy full --answers answers.jsonl
  trimkv-export eval PACKAGE --task questions.jsonl --text book.txt --plot quality.png --json
\b
A line of a task file:
  {"context": "A long text …", "prompt": "Which …? Answer:", "answer": " 42"}
  {"text": "A text whose perplexity is measured …"}
"""
# A text of fewer than two tokens has no perplexity.
CONTEXT = click.IntRange(2)


@click.command("eval", epilog=EPILOG)
@click.argument("package", type=FILE)
@click.option(
    "--task",
    "files",
    type=FILE,
    multiple=True,
    help="A file of questions and texts, in JSON lines; repeat it for more.",
)
@click.option("--text", type=FILE, help="Measure perplexity on this file.")
@click.option(
    "--context", type=CONTEXT, default=2048, show_default=True, help="Cut the --text into pieces of so many tokens."
)
@click.option(
    "--budget",
    "budgets",
    type=int,
    multiple=True,
    help="Measure with this budget, also a larger one than the package's; repeat it for more. Default: the package's, "
    "and 1/2, 1/4 and 1/8 of it.",
)
@click.option(
    "--policy",
    "policies",
    type=click.Choice([str(policy) for policy in EvaluatedPolicy]),
    multiple=True,
    help="Measure with this policy; repeat it for more. Default: all of them.",
)
@click.option("--seed", default=0, show_default=True, help="Repeat the draws of the policy random.")
@click.option(
    "--native",
    type=click.Choice(["auto", "require", "off"]),
    default="auto",
    show_default=True,
    help="Use native kernels where there are any, insist on them, or use the portable bodies.",
)
@threads_option
@click.option("--plot", "picture", type=FILE, help="Draw quality against budget: a PNG file.")
@click.option("--answers", type=FILE, help="Write every answer to this file, in JSON lines.")
@json_option
def command(
    package: Path,
    files: tuple[Path, ...],
    text: Path | None,
    context: int,
    picture: Path | None,
    answers: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure the quality of PACKAGE: accuracy on questions and perplexity on texts, for several budgets and policies.

    The policies global and per_head go by the package's gates. The others are there to compare with: they keep the
    newest tokens of each head, the first four and the newest, a random choice, or everything.
    """
    if not files and text is None:
        raise OptionError("nothing to evaluate: give --task FILE.jsonl or --text FILE")
    plots = load_plots("quality", "--plot", picture) if picture else None
    if answers:
        require_writable(answers)
    tasks = [task for file in files for task in read_tasks(file)]
    if text is not None:
        tasks.append(Text(read_text(text, "--text"), context))
    with build_progress() as progress:
        results = evaluate(package, tasks, **options, progress=progress)
    if picture and plots:
        plots.draw_quality(results, picture)
    if answers:
        _write_answers(results, answers)
    if as_json:
        print_json({"package": str(package), "results": [result.as_dict() for result in results]})
        return
    first = results[0]
    if first.question_context is not None:
        about = f"contexts of {first.question_context:,.0f} tokens on average"
        _print(f"Accuracy on {first.questions:,} questions, {about}", results, lambda r: f"{r.accuracy:.1%}")
    if first.text_context is not None:
        about = f"texts of {first.text_context:,.0f} tokens on average"
        _print(f"Perplexity of {first.tokens:,} tokens, {about}", results, lambda r: f"{r.perplexity:#.4g}")


def _print(title: str, results: Sequence[Result], cell: Callable[[Result], str]) -> None:
    """A table, policies by budgets."""
    budgets = sorted({result.budget for result in results})
    rows = {result.policy: dict.fromkeys(budgets, "") for result in results}
    for result in results:
        rows[result.policy][result.budget] = cell(result)
    columns = ["budget", *(f"{budget:,}" for budget in budgets)]
    print_columns(title, columns, [[policy, *cells.values()] for policy, cells in rows.items()])


def _write_answers(results: Sequence[Result], file: Path) -> None:
    with writable(file, "the answers cannot be written") as out:
        for result in results:
            about = {"policy": str(result.policy), "budget": result.budget}
            for answer in result.answers:
                row = about | vars(answer) | {"correct": answer.correct}
                out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
