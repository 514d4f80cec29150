"""How the command line words its help and what it refuses, for all commands."""

from collections.abc import Iterable, Iterator

import click

from trimkv_export.words import did_you_mean

__all__ = ["Context", "usage_message"]

HYPHEN = "\N{NON-BREAKING HYPHEN}"


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


class Context(click.Context):
    """Of a command whose help is laid out so."""

    formatter_class = _Formatter


def usage_message(error: click.UsageError) -> str:
    """What click says, as our errors say it."""
    context, said = error.ctx, error.message.rstrip(".")
    if isinstance(error, click.NoSuchOption):
        known = [name for each in context.command.get_params(context) for name in each.opts] if context else []
        said = f"there is no option {error.option_name!r}; {did_you_mean(error.option_name, known)}".removesuffix("; ")
    elif isinstance(error, click.BadParameter) and error.param is not None:
        option = error.param.param_type_name == "option"
        name = max(error.param.opts, key=len) if option else error.param.human_readable_name
        said = f"{name} is missing" if isinstance(error, click.MissingParameter) else f"{name}: {said}"
    else:
        said = said[:1].lower() + said[1:]
    program = context.command_path if context else "trimkv-export"
    return f"{said}{'' if said.endswith('?') else '.'} See {program} --help"
