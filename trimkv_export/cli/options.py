"""The table of options (config.py) as options of commands, and what `build` and `plan` share around it."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from trimkv_export.checkpoint.aliases import ALIASES
from trimkv_export.cli.console import print_json, print_table
from trimkv_export.cli.usage import NamedOption, check_texts
from trimkv_export.config import BASICS, GROUPS, Option, options_of
from trimkv_export.errors import OptionError
from trimkv_export.words import amount

if TYPE_CHECKING:
    from trimkv_export.plan import DeviceProfile

__all__ = [
    "Command",
    "given",
    "grouped_option",
    "list_options",
    "print_lists",
    "recipe_option",
    "table_options",
    "values_of",
]

OTHER = "Other options"
Function = Callable[..., None]


class Command(click.Command):
    """A command whose help lists options in groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for each group."""
        sections: dict[str, list[tuple[str, str]]] = {group: [] for group in (*GROUPS, OTHER)}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                sections[getattr(parameter, "group", OTHER)].append(record)
        for group, records in sections.items():
            if records:
                with formatter.section(group):
                    formatter.write_dl(records)


class _GroupedOption(NamedOption):
    def __init__(self, *arguments: Any, group: str, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.group = group


def grouped_option(group: str, *names: str, **more: Any) -> Callable[[Function], Function]:
    """`click.option`, with the group that the help lists it in."""
    return click.option(*names, cls=_GroupedOption, group=group, **more)


def table_options(owner: type) -> Callable[[Function], Function]:
    """Options of a command for the fields of a dataclass of config.py."""

    def add(function: Function) -> Function:
        for option in reversed(options_of(owner)):
            function = _click_option(option)(function)
        return function

    return add


def _click_option(option: Option) -> Callable[[Function], Function]:
    """The table checks the values, so that there is one message for each."""
    names, choices = f"--{option.flag}", [str(choice) for choice in option.choices]
    more: dict[str, Any] = {"default": option.default}
    if option.kind is bool:
        more["is_flag"] = True
        if option.default is not False:
            names += f"/--{option.off or f'no-{option.flag}'}"
    else:
        more["type"] = {int: _whole, float: _number}.get(option.kind, str)
        more["metavar"] = {int: "INTEGER", float: "NUMBER", Path: "PATH"}.get(option.kind, "TEXT")
    if choices:
        more["metavar"] = f"[{'|'.join(choices)}]"
        more["default"] = None if option.default is None else str(option.default)
        more["shell_complete"] = lambda _ctx, _option, typed: [each for each in choices if each.startswith(typed)]
    shown = option.default is not None and option.default is not False
    return grouped_option(option.group, names, option.name, help=option.help, show_default=shown, **more)


def _whole(value: str | int) -> str | int:
    try:
        return int(value)
    except ValueError:
        return value


def _number(value: str | float) -> str | float:
    try:
        return float(value)
    except ValueError:
        return value


def recipe_option(function: Function) -> Function:
    """--recipe."""
    text = "Take these options from a recipe, by its name (qwen3-8b-l4) or its YAML file; options that are given win."
    return grouped_option(BASICS, "--recipe", help=text)(function)


def given(name: str) -> bool:
    """Whether an option is on the command line."""
    return click.get_current_context().get_parameter_source(name) is not ParameterSource.DEFAULT


def values_of(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a command's options; where they are not given, those of the --recipe, which is taken out.

    Raises:
        OptionError: neither says which model, or as `read_recipe`.
    """
    if (recipe := values.pop("recipe")) is not None:
        from trimkv_export.build.recipe import read_recipe

        # Another model has other gates and revisions.
        fixed = {name for name in values if given(name)} | ({"gates", "revision"} if given("model") else set())
        values |= {name: value for name, value in vars(read_recipe(recipe)).items() if name in values.keys() - fixed}
        check_texts(click.get_current_context().command, values)
    if values["model"] is None:
        raise OptionError("there is no model: give --model, or a --recipe that says it")
    return values


def list_options(function: Function) -> Function:
    """--list-models and --list-devices; the command gives them to `print_lists`."""
    function = click.option("--list-devices", is_flag=True, help="Print the devices that --device takes.")(function)
    return click.option("--list-models", is_flag=True, help="Print the aliases that --model takes.")(function)


def print_lists(values: dict[str, Any], as_json: bool) -> bool:
    """Print the lists that were asked for, taking these options out; whether any was."""
    list_models, list_devices = values.pop("list_models"), values.pop("list_devices")
    if not (list_models or list_devices):
        return False
    from trimkv_export.plan import devices

    profiles, aliases = devices() if list_devices else (), ALIASES.values() if list_models else ()
    if as_json:
        lists = {"models": aliases, "devices": profiles}
        print_json({name: [asdict(each) for each in rows] for name, rows in lists.items() if rows})
        return True
    if aliases:
        print_table("Models (--model NAME)", {each.name: f"{each.backbone} with {each.gates}" for each in aliases})
    if profiles:
        print_table("Devices (--device NAME)", {each.name: _device_row(each) for each in profiles})
    return True


def _device_row(profile: "DeviceProfile") -> str:
    memory = "what is available here now" if profile.memory_bytes is None else amount(profile.memory_bytes)
    speed = f", {amount(profile.bandwidth)}/s" if profile.bandwidth else ""
    reserve = f", {amount(profile.reserve_bytes)} reserved" if profile.reserve_bytes else ""
    return f"{profile.title}: {memory}{speed}{reserve}; {', '.join(profile.precisions)}"
