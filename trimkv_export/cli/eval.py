"""`trimkv-export eval`."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trimkv_export.cli.console import build_progress, json_option, print_columns, print_json, read_prompt
from trimkv_export.errors import MissingDependencyError, OptionError, OutputError

if TYPE_CHECKING:
    from trimkv_export.evaluation import Result

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
Writer = Callable[[Sequence["Result"]], None]


@click.command("eval", epilog=EPILOG)
@click.argument("package", type=click.Path(path_type=Path))
@click.option(
    "--task", "files", type=click.Path(path_type=Path), multiple=True, help="Questions and texts; repeat it for more."
)
@click.option("--text", type=click.Path(path_type=Path), help="Measure perplexity on this file.")
@click.option("--context", type=CONTEXT, default=2048, show_default=True, help="Tokens of a piece of the --text.")
@click.option(
    "--budget",
    "budgets",
    type=int,
    multiple=True,
    help="May be more than the package was built for; repeat it. Default: the package's, and 1/2, 1/4, 1/8 of it.",
)
@click.option(
    "--policy",
    "policies",
    type=click.Choice(["global", "per_head", "recent", "sinks+recent", "random", "full"]),
    multiple=True,
    help="What decides which entries stay; repeat it. Default: all.",
)
@click.option("--seed", default=0, show_default=True, help="Of the policy random.")
@click.option(
    "--native",
    type=click.Choice(["auto", "require", "off"]),
    default="auto",
    show_default=True,
    help="Use native kernels where there are any, insist on them, or use the portable bodies.",
)
@click.option("--threads", type=int, help="Threads of a step. Default: one per core.")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="Draw quality against budget: a PNG file.")
@click.option("--answers", type=click.Path(path_type=Path), help="Write what was generated: JSON lines, one an answer.")
@json_option
def command(
    package: Path,
    files: tuple[Path, ...],
    text: Path | None,
    context: int,
    budgets: tuple[int, ...],
    policies: tuple[str, ...],
    seed: int,
    native: str,
    threads: int | None,
    picture: Path | None,
    answers: Path | None,
    as_json: bool,
) -> None:
    """Measure the quality of PACKAGE: accuracy on questions and perplexity on texts, for several budgets and policies.

    global and per_head go by the package's gates. The rest is to compare with: the newest tokens of each head, the
    first four and the newest, a random choice, and a full cache.
    """
    if not files and text is None:
        raise OptionError("nothing to evaluate: give --task FILE.jsonl or --text FILE")
    try:
        from trimkv_export.evaluation import Text, evaluate, read_tasks
    except ImportError as error:
        raise MissingDependencyError(
            f"evaluating needs the package {error.name!r}; install it with: pip install 'trimkv-export[export,runtime]'"
        ) from None
    # Before minutes of work.
    outputs = [writer(file) for writer, file in ((_plot, picture), (_answers, answers)) if file is not None]
    tasks = [task for file in files for task in read_tasks(file)]
    if text is not None:
        tasks.append(Text(read_prompt(None, text), context))
    with build_progress() as progress:
        results = evaluate(
            package,
            tasks,
            policies,
            budgets,
            native=native,
            threads=threads,
            seed=seed,
            progress=progress,
        )
    for write in outputs:
        write(results)
    if as_json:
        print_json({"package": str(package), "results": [result.as_dict() for result in results]})
        return
    first = results[0]
    about = f"contexts of {first.context:,.5g} tokens"
    if first.questions:
        _print(f"Accuracy on {first.questions:,} questions, {about}", results, lambda r: f"{r.accuracy:.1%}")
    if first.tokens:
        _print(f"Perplexity of {first.tokens:,} tokens, {about}", results, lambda r: f"{r.perplexity:#.4g}")


def _print(title: str, results: Sequence["Result"], cell: Callable[["Result"], str]) -> None:
    """A table, policies by budgets."""
    budgets = sorted({result.budget for result in results})
    rows = {result.policy: dict.fromkeys(budgets, "") for result in results}
    for result in results:
        rows[result.policy][result.budget] = cell(result)
    columns = ["budget", *(f"{budget:,}" for budget in budgets)]
    print_columns(title, columns, [[policy, *cells.values()] for policy, cells in rows.items()])


def _plot(picture: Path) -> Writer:
    try:
        from trimkv_export.cli.plots.quality import draw_quality
    except ImportError:
        raise MissingDependencyError(
            "--plot draws with matplotlib; install it with: pip install 'trimkv-export[plot]'"
        ) from None
    _check_folder(picture)

    def draw(results: Sequence["Result"]) -> None:
        try:
            draw_quality(results, picture)
        except (OSError, ValueError) as error:
            raise OutputError(f"{picture}: the picture cannot be written: {error}") from None

    return draw


def _answers(file: Path) -> Writer:
    _check_folder(file)

    def write(results: Sequence["Result"]) -> None:
        try:
            with file.open("w", encoding="utf-8") as out:
                for result in results:
                    about = {"policy": str(result.policy), "budget": result.budget}
                    for answer in result.answers:
                        row = about | vars(answer) | {"correct": answer.correct}
                        out.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise OutputError(f"{file}: the answers cannot be written: {error.strerror or error}") from None

    return write


def _check_folder(file: Path) -> None:
    if not file.absolute().parent.is_dir():
        raise OutputError(f"{file}: there is no folder {file.parent}")
