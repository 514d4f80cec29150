"""What the repository's texts refer to is there, and the commands and examples of the documentation are true."""

import contextlib
import importlib
import re
import runpy
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from support import MAX_IMAGE_TOKENS, ROOT, build, make_visual_checkpoint
from test_imports import ORDER

from trimkv_export.checkpoint.aliases import ALIASES
from trimkv_export.cli import COMMANDS
from trimkv_export.models import supported_model_types
from trimkv_export.package.package import FORMAT_VERSION
from trimkv_export.policy import STATE_TENSORS

TOP = "trimkv_export|tests|plugins|docs|examples|benchmarks|docker|engines"
# What only its writers could open. In brackets, so that this file does not find itself.
CLOSED = re.compile(r"(?<![\w./-])shared[/]|\bissue [#]?\d+|\bproject note[s]\b", re.IGNORECASE)
FILE = re.compile(rf"(?<![\w./-])(?:{TOP})/(?:[\w.-]+/)*[\w-]+\.(?:cc|cu|h|md|png|py|sh|txt|yaml)\b")
SECTION = re.compile(r"(docs/[\w-]+\.md),?\s+sections?\s+(\d+)(?:\s+and\s+(\d+))?")
LINK = re.compile(r"\]\((?!https?://|mailto:)([^)\s]+)\)")
QUOTED = re.compile(rf"`((?:{TOP})/[\w./-]+)`")
# Made by a build, so not tracked.
MADE = "trimkv_export/native"


def _text_files() -> Iterator[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        file = ROOT / name
        if file.is_file() and b"\0" not in file.read_bytes()[:4096]:
            yield file


TEXTS = {file: file.read_text(encoding="utf-8") for file in _text_files()}
PAGES = {file: text for file, text in TEXTS.items() if file.suffix == ".md"}


def _name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def _anchors(text: str) -> set[str]:
    """The fragments of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_nothing_cites_what_its_reader_cannot_open() -> None:
    found = [f"{_name(file)}: {match[0]}" for file, text in TEXTS.items() for match in CLOSED.finditer(text)]
    assert found == []


def test_files_that_are_cited_are_there() -> None:
    cited = {(_name(file), match[0]) for file, text in TEXTS.items() for match in FILE.finditer(text)}
    assert {path for _, path in cited} >= {"docs/design.md", "docs/triton.md", "tests/gpu/run.sh"}
    assert sorted((file, path) for file, path in cited if not (ROOT / path).is_file()) == []


def test_sections_that_are_cited_are_there() -> None:
    missing, count = [], 0
    for file, text in TEXTS.items():
        for page, *numbers in SECTION.findall(text):
            for number in filter(None, numbers):
                count += 1
                if not re.search(rf"^## {number}\. ", TEXTS[ROOT / page], re.MULTILINE):
                    missing.append(f"{_name(file)}: {page}, section {number}")
    assert missing == []
    assert count > 20


@pytest.mark.parametrize("page", sorted(map(_name, PAGES)))
def test_links_and_paths_of_a_page(page: str) -> None:
    file = ROOT / page
    text = re.sub(r"```.*?```", "", PAGES[file], flags=re.DOTALL)
    for link in LINK.findall(text):
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        assert target.exists(), link
        assert not anchor or anchor in _anchors(PAGES[target]), link
    for path in QUOTED.findall(text):
        assert path.startswith(MADE) or (ROOT / path).exists(), path


def test_the_command_line_is_as_documented() -> None:
    maker = runpy.run_path(str(ROOT / "docs" / "make_cli.py"))
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert maker["reference"]() == page, "make the page again: python docs/make_cli.py --write"


def test_the_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, in a folder with what they name."""
    checkpoint = make_visual_checkpoint(tmp_path / "checkpoint")
    build(checkpoint, tmp_path / "vision-model", max_image_tokens=MAX_IMAGE_TOKENS)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "frames").mkdir()
    for place in ("a.jpg", *(f"frames/{number}.png" for number in range(4))):
        Image.new("RGB", (64, 64), "teal").save(tmp_path / place)
    monkeypatch.chdir(tmp_path)
    pages = (ROOT / "docs" / "python.md", ROOT / "README.md")
    text = "".join(PAGES[page] for page in pages)
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"block {number + 1}", "exec"), names)  # noqa: S102 (our own examples)
    assert len(blocks) > 9
    assert (tmp_path / "conversation.session").is_file()


def _commands() -> Iterator[tuple[str, list[str]]]:
    """The page and the words of every command line in a page's code, up to a comment or a pipe."""
    for file, text in PAGES.items():
        for line in re.findall(r"^(?: {4,}|)(?:\$ )?((?:trimkv-export|make) .*)$", text, re.MULTILINE):
            with contextlib.suppress(ValueError):  # a quote that goes on in the next line
                words = shlex.split(line, comments=True)
                yield _name(file), words[: next((at for at, word in enumerate(words) if word in "|>;"), None)]


def test_commands_of_the_pages_are_known() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    found = list(_commands())
    for page, (tool, *words) in found:
        if tool == "make":
            named = [word for word in words if word != "make" and not word.startswith("-") and "=" not in word]
            assert not page.endswith(("README.md", "CONTRIBUTING.md")) or set(named[:1]) <= targets, (page, words)
        else:
            assert words[0] in COMMANDS, (page, words)
            parameters = importlib.import_module(f"trimkv_export.cli.{words[0]}").command.params
            flags = {flag for parameter in parameters for flag in (*parameter.opts, *parameter.secondary_opts)}
            given = {word.partition("=")[0] for word in words if word.startswith("-")}
            assert given <= flags | {"-h", "--help"}, (page, words)
    assert len(found) > 30


def test_errors_that_are_explained_are_those_that_are_raised() -> None:
    joined = "".join(
        re.sub(r'"\s*\n\s*f?"', "", text) for file, text in TEXTS.items() if _name(file).startswith("trimkv_export/")
    )
    rows = re.findall(r"^\| (`.*?) \| ", (ROOT / "docs" / "troubleshooting.md").read_text("utf-8"), re.MULTILINE)
    quoted = [part.strip() for row in rows for span in re.findall(r"`(.*?)`", row) for part in span.split("…")]
    known = set(COMMANDS) | {"doctor", "session_id", "run --check-plan"}
    assert [part for part in quoted if part and part not in known and part not in joined] == []
    assert len(quoted) > 40


def test_aliases_are_as_documented() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.-]+)` \| ([\w.-]+/[\w.-]+) \| ([\w./-]+) \|$", page, re.MULTILINE)
    assert rows == [(alias.name, alias.backbone, alias.gates) for alias in ALIASES.values()]


def test_families_are_as_documented() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `(\w+)`.*? \| rg", page, re.MULTILINE)
    assert sorted(named) == sorted(supported_model_types())


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


def _section(number: int) -> str:
    """A section of docs/design.md."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    return re.split(r"^## ", text, flags=re.MULTILINE)[number]


def test_the_design_says_what_is_there() -> None:
    state = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| \[B", _section(4), re.MULTILINE)
    assert re.findall(r"`(\w+)`", " ".join(state)) == list(STATE_TENSORS)
    assert FORMAT_VERSION in _section(7)
    rows = re.findall(r"^\| (`.*?) \| ", _section(10).split("### Map")[0], re.MULTILINE)
    assert [tuple(re.findall(r"`(\w+)`", row)) for row in rows] == list(ORDER)


def test_the_map_names_folders() -> None:
    rows = re.findall(r"^\| .*\? \| (.*) \|$", _section(10), re.MULTILINE)
    assert len(rows) == 16
    for folder in re.findall(r"`([\w/]+/)`", " ".join(rows)):
        assert (ROOT / folder).is_dir() or (ROOT / "trimkv_export" / folder).is_dir(), folder
