"""`trimkv-export triton`."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import click

from trimkv_export.cli.console import json_option, print_json, print_table, provider_option
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
    "threads": "Threads of a step; 0: one per core.",
    "budget": "Keep fewer entries than the package was built for; 0: as many.",
    "max_sequences": "Requests that run at a time; each has a row of the cache.",
    "queue_limit": "Requests that wait for a row; more are refused.",
    "prefill_chunk": "Most tokens of a prompt between two decode steps; 0: the package's.",
    "max_prompt_bytes": "Longest text of a request.",
    "max_images": "Most images of a request.",
    "max_image_bytes": "Largest image file.",
    "max_tokens": "Most tokens that a request may ask for.",
    "default_max_tokens": "Tokens of a request that does not say.",
    "temperature": "Likewise; 0 always takes the likeliest token.",
    "top_p": "Likewise.",
    "top_k": "Likewise; 0 is off.",
    "repetition_penalty": "Likewise.",
    "timeout": "Seconds that a request may take; 0: no limit.",
    "max_conversations": "Conversations kept between turns, each as large as a row of the cache.",
    "conversation_expiry": "Seconds after which an unused conversation is forgotten.",
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
@click.option("--name", help="Name of the model. Default: that of the package folder.")
@click.option(
    "--environment",
    type=click.Path(path_type=Path),
    help="The virtual environment that the model runs in, where the server's own Python is not the one.",
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
    """Write PACKAGE as a model of a Triton model repository, which serves many at once.

    The options can be changed later, in `parameters` of the model's config.pbtxt. See docs/triton.md.
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
