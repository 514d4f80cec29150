"""Make docs/cli.md from the command line itself.

python docs/make_cli.py            print it
python docs/make_cli.py --write    write docs/cli.md
"""

import argparse
import contextlib
import io
import os
from pathlib import Path

from trimkv_export.cli import COMMANDS, main

PAGE = Path(__file__).with_name("cli.md")
COLUMNS = "80"
HEAD = """# The command line

What `--help` prints, for every command. `python docs/make_cli.py --write` makes this page; a test compares the two.

Every command ends with one of the exit codes below, and an error is one message on stderr that says what to do. With
`--json`, the report on stdout is JSON.
"""


def reference() -> str:
    """The page: a section for each command, with its help text as a terminal of 80 columns shows it."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = COLUMNS
    try:
        return "\n".join([HEAD, _section(), *map(_section, COMMANDS)])
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _section(*command: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        main([*command, "--help"])
    lines = [line.rstrip() for line in shown.getvalue().splitlines()]
    return "\n".join([f"## {' '.join(['trimkv-export', *command])}", "", "```text", *lines, "```", ""])


def run() -> None:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE}")
    if parser.parse_args().write:
        PAGE.write_text(reference(), encoding="utf-8")
    else:
        print(reference(), end="")


if __name__ == "__main__":
    run()
