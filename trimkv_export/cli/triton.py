"""`trimkv-export triton`."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import click

from trimkv_export.cli.console import json_option, print_json, print_table, provider_option
from trimkv_export.cli.usage import FILE
from trimkv_export.serving.options import ServingOptions
from trimkv_export.serving.triton.repository import write_repository
from trimkv_export.words import amount

__all__ = ["command"]

EPILOG = """\b
Examples:
  trimkv-export triton PACKAGE --output model_repository
  trimkv-export triton PACKAGE --output model_repository --name chat \\
      --max-sequences 8 --temperature 0.7
  tritonserver --model-repository=model_repository
"""


def _serving_options(function: Any) -> Any:
    """An option for each field of ServingOptions; `provider_option` is that of the provider."""
    for field in reversed(fields(ServingOptions)[1:]):
        name, about = "--" + field.name.replace("_", "-"), field.metadata["help"]
        flag = field.type is bool
        function = click.option(name, default=field.default, is_flag=flag, show_default=not flag, help=about)(function)
    return function


@click.command("triton", epilog=EPILOG)
@click.argument("package", type=FILE)
@click.option("--output", type=FILE, required=True, help="The model repository, a folder.")
@click.option("--name", help="The model's name. Default: that of the package folder.")
@click.option(
    "--environment",
    type=FILE,
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
