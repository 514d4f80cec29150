"""`trimkv-export triton`."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import click

from trimkv_export.cli.console import SAMPLING, json_option, print_json, print_table, provider_option
from trimkv_export.serving.options import ServingOptions
from trimkv_export.serving.triton.repository import write_repository
from trimkv_export.words import amount

__all__ = ["command"]

EPILOG = """\b
Examples:
  trimkv-export triton PACKAGE --output model_repository
  trimkv-export triton PACKAGE --output model_repository --name chat --max-sequences 8 --temperature 0.7
  tritonserver --model-repository=model_repository
"""
HELP = {
    "threads": "Threads that compute a step; 0: as many as the process may keep busy.",
    "budget": "Keep fewer entries than the package was built for; 0: as many.",
    "max_sequences": "Requests that run at the same time; each has a row of the cache.",
    "queue_limit": "Requests that may wait for a row; more are refused.",
    "prefill_chunk": "Most tokens of a prompt that are read between two decode steps; 0: the package's.",
    "max_prompt_bytes": "Bytes of the longest text that a request may have.",
    "max_images": "Most images that a request may have.",
    "max_image_bytes": "Bytes of the largest image file that is read.",
    "max_tokens": "Most tokens that a request may ask for.",
    "default_max_tokens": "Tokens that a request gets if it does not say how many.",
    **{name: f"For requests that do not say: {text[0].lower()}{text[1:]}" for name, text in SAMPLING.items()},
    "timeout": "Seconds that a request may take; 0: no limit.",
    "max_conversations": "Conversations that are kept between turns; each takes as much as a row of the cache.",
    "conversation_expiry": "Seconds after which a conversation that is not used is forgotten.",
}


def _serving_options(function: Any) -> Any:
    """An option for each field of ServingOptions."""
    for field in reversed(fields(ServingOptions)):
        if field.name in HELP:
            option = "--" + field.name.replace("_", "-")
            function = click.option(option, default=field.default, show_default=True, help=HELP[field.name])(function)
    return function


@click.command("triton", epilog=EPILOG)
@click.argument("package", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The model repository, a folder.")
@click.option("--name", help="The model's name. Default: that of the package folder.")
@click.option(
    "--environment",
    type=click.Path(path_type=Path),
    help="Run the model in this virtual environment. Default: the server's own Python.",
)
@provider_option
@_serving_options
@click.option("--overwrite", is_flag=True, help="Replace the model if the repository has it already.")
@json_option
def command(
    package: Path,
    output: Path,
    name: str | None,
    environment: Path | None,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write PACKAGE into a model repository of Triton, which serves many requests at once.

    The options can be changed later: they are `parameters` in the model's config.pbtxt.
    """
    report = write_repository(
        package, output, ServingOptions(**options), name=name, environment=environment, overwrite=overwrite
    )
    if as_json:
        print_json({**asdict(report), "path": str(report.path)})
        return
    print_table(
        str(report.path),
        {
            "model": report.model,
            "cache": f"{amount(report.cache_bytes)} for {options['max_sequences']} sequences at a time",
            "conversations": f"{amount(report.conversation_bytes)} if all {options['max_conversations']} are in use",
            "next": f"tritonserver --model-repository={output.absolute()}",
        },
    )
