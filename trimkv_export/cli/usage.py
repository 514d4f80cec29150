"""How the command line words its help and what it refuses, for all commands."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from trimkv_export.errors import OptionError
from trimkv_export.words import did_you_mean, shorten

__all__ = ["FILE", "Context", "NamedOption", "check_texts", "usage_message"]

HYPHEN = "\N{NON-BREAKING HYPHEN}"
# Bytes of a file's name, and of a path, as Linux has them.
MOST_OF_NAME, MOST_OF_PATH = 255, 4095
MOST_SAID = 400  # characters of what click says, which quotes values whole


class _Formatter(click.HelpFormatter):
    """Breaks no line within a word such as --max-batch, and long examples between options, as a shell reads them."""

    def write_text(self, text: str) -> None:
        lines = [part for line in text.splitlines() for part in self._broken(line)]
        super().write_text("\n".join(lines).replace("-", HYPHEN))

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        super().write_dl([(term, said.replace("-", HYPHEN)) for term, said in rows], col_max, col_spacing)

    def write(self, string: str) -> None:
        super().write(string.replace(HYPHEN, "-"))

    def _broken(self, line: str) -> Iterator[str]:
        width = self.width - self.current_indent
        while len(line) > width and line.startswith("  ") and " --" in line[8 : width - 1]:
            cut = line.rindex(" --", 8, width - 1)
            yield f"{line[:cut]} \\"
            line = f"      {line[cut + 1 :]}"
        yield line


class _File(click.Path):
    """As click's, but nothing is looked up yet: a name may be one that the system refuses to look up."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:  # noqa: ARG002
        """Return the path; it is looked at before the command runs."""
        return Path(value)


FILE = _File()


class NamedOption(click.Option):
    """An option whose text may name a file."""


class Context(click.Context):
    """Of a command whose help is laid out so. Its texts are looked at before it runs."""

    formatter_class = _Formatter

    def invoke(self, callback: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a command's function; a text that no file system or tokenizer takes is refused before."""
        if callback is self.command.callback:
            check_texts(self.command, self.params)
        return super().invoke(callback, *args, **kwargs)


def check_texts(command: click.Command, values: Mapping[str, Any]) -> None:
    """Look at every text among the values of a command's parameters, and at the names of files in particular.

    Raises:
        OptionError: a text is not UTF-8; a file's name is too long for any file system, or has a NUL character.
    """
    for param in command.params:
        value = values.get(param.name or "")
        names_file = isinstance(param, NamedOption) or isinstance(param.type, click.Path)
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, str | Path):
                _check_text(_name(param), str(each), names_file=names_file)


def _check_text(name: str, text: str, *, names_file: bool) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # Python passes the bytes of an argument that is not UTF-8 as surrogates
        quoted = f": {shorten(text)}; rename the file" if names_file else ""
        raise OptionError(f"{name}: is not UTF-8 text, at character {error.start}{quoted}") from None
    if not names_file:
        return
    if "\0" in text:
        raise OptionError(f"{name}: has a NUL character, which no file's name can have: {shorten(text)}")
    longest = max((len(part.encode()) for part in Path(text).parts), default=0)
    if longest > MOST_OF_NAME or len(text.encode()) > MOST_OF_PATH:
        size, what = (longest, "name") if longest > MOST_OF_NAME else (len(text.encode()), "path")
        most = MOST_OF_NAME if what == "name" else MOST_OF_PATH
        raise OptionError(f"{name}: a file's {what} has at most {most:,} bytes, and this one {size:,}: {shorten(text)}")


def _name(param: click.Parameter) -> str:
    return max(param.opts, key=len) if param.param_type_name == "option" else param.human_readable_name


def usage_message(error: click.UsageError) -> str:
    """What click says, as our errors say it."""
    context, said = error.ctx, error.message.rstrip(".")
    if isinstance(error, click.NoSuchOption):
        known = [name for each in context.command.get_params(context) for name in each.opts] if context else []
        hint = did_you_mean(error.option_name, known)
        said = f"there is no option {shorten(error.option_name)}{'; ' if hint else ''}{hint}"
    elif isinstance(error, click.BadParameter) and error.param is not None:
        name = _name(error.param)
        said = f"{name} is missing" if isinstance(error, click.MissingParameter) else f"{name}: {said}"
    else:
        said = said[:1].lower() + said[1:]
    said = said if len(said) <= MOST_SAID else f"{said[:MOST_SAID]}…"
    program = context.command_path if context else "trimkv-export"
    return f"{said}{'' if said.endswith('?') else '.'} See {program} --help"
