"""The settings of a served model: one table for Python, the command line and config.pbtxt."""

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from support import Cli

from trimkv_export.errors import OptionError
from trimkv_export.runtime import Engine
from trimkv_export.serving import ServingOptions


@pytest.mark.parametrize("field", fields(ServingOptions), ids=lambda field: field.name)
def test_every_option_says_what_it_does(field: Any) -> None:
    about = field.metadata["help"]
    assert re.fullmatch(r"[A-Z].*\.", about)
    assert re.search(r"\b(is|are|has|have|may|keeps|takes|uses|runs|run|gets|draws)\b", about)
    assert "ikewise" not in about


def test_the_command_line_has_every_option(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    shown = " ".join(cli("triton", "--help").out.split())
    for field in fields(ServingOptions):
        assert f"--{field.name.replace('_', '-')} " in shown
        default = "" if field.type is bool else f" [default: {field.default}]"  # a flag that is not given is off
        assert field.name == "provider" or field.metadata["help"] + default in shown


@pytest.mark.parametrize(
    "field", [field for field in fields(ServingOptions) if field.type is int], ids=lambda f: f.name
)
def test_the_least_value(field: Any) -> None:
    low = field.metadata["low"]
    if field.name != "max_tokens":  # which default_max_tokens may not exceed
        assert getattr(replace(ServingOptions(), **{field.name: low}), field.name) == low
    values: list[Any] = [low - 1, field.metadata["high"] + 1, True, 1.5]
    for bad in values:
        with pytest.raises(OptionError, match=f"{field.name} must be a whole number from {low} to .*, got {bad!r}"):
            replace(ServingOptions(), **{field.name: bad})


def test_a_package_plugin_is_loaded_on_request(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(Engine, "open", lambda *_, **options: given.append(options["trust_package_plugin"]))
    for trust in (False, True):
        ServingOptions(provider="tensorrt", trust_package_plugin=trust).open_engine(package)
    assert given == [False, True]
    assert ServingOptions.from_parameters({"trust_package_plugin": "true"}).trust_package_plugin
