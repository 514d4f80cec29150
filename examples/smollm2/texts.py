"""The texts that gates for SmolLM2 are trained on, and those that they are measured on, out of Debian packages.

    python examples/smollm2/texts.py OUT

    OUT/train/*.txt       one file for each package, at most LARGEST bytes
    OUT/held_out/*.txt    of packages that no gate has seen

`apt-get download` needs no root: the packages are unpacked into a folder of their own and not installed.
"""

import argparse
import gzip
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

__all__ = ["read_texts"]

LARGEST = 2_500_000
SHORTEST = 400  # characters; pages below are indexes and redirections


@dataclass(frozen=True)
class Source:
    """Files of a Debian package.

    Attributes:
        package: its name.
        files: patterns of paths in it.
        read: makes text of a file's bytes.
        what: for the list of sources.
        held_out: it is for measuring.
    """

    package: str
    files: tuple[str, ...]
    read: Callable[[str], str]
    what: str
    held_out: bool = False


class _Html(HTMLParser):
    """The text of a page: paragraphs, lists and listings; nothing of menus, scripts and tables of contents."""

    SKIPPED = frozenset("script style head nav footer header aside form button svg info".split())
    BLOCKS = frozenset("p div li dt dd tr br pre section table ul ol blockquote item title".split())
    HEADS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6"})
    MENUS = re.compile(r"\b(?:nav|toc|sidebar|sphinxsidebar|related|footer|breadcrumb|headerlink|genindex)")
    EMPTY = frozenset({"br", "hr", "img", "input", "link", "meta", "col", "wbr", "area", "base"})

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._skipped: list[str] = []
        self._listing = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.EMPTY:
            self.parts.append("\n" if tag == "br" else "")
            return
        classes = " ".join(value or "" for name, value in attrs if name in ("class", "id", "role"))
        if self._skipped:
            self._skipped += [tag] * (tag == self._skipped[0])
        elif tag in self.SKIPPED or (tag in ("div", "a", "ul", "table") and self.MENUS.search(classes)):
            self._skipped.append(tag)
        elif tag in self.HEADS:
            self.parts.append("\n\n")
        elif tag in self.BLOCKS:
            self._listing += tag == "pre"
            self.parts.append("\n\n" if tag in ("p", "pre") else "\n")

    def handle_endtag(self, tag: str) -> None:
        if self._skipped:
            if tag == self._skipped[0]:
                self._skipped.pop()
        elif tag in self.BLOCKS or tag in self.HEADS:
            self._listing -= tag == "pre" and self._listing > 0
            self.parts.append("\n\n" if tag in self.HEADS or tag in ("p", "pre") else "\n")

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.parts.append(data if self._listing else re.sub(r"\s+", " ", data))


def _html(text: str) -> str:
    parser = _Html()
    parser.feed(text)
    return re.sub(r"\n[ \t]+(?=\n)", "\n", "".join(parser.parts))


def _pod(text: str) -> str:
    """Perl's documentation: formatting codes such as C<...> give way to what they hold."""
    text = re.sub(r"(?m)^=(?:head\d|item|over|back|cut|pod|encoding|for|begin|end)[ \t]*(.*)$", r"\1", text)
    for _ in range(3):
        text = re.sub(r"\b[A-Z]<<*\s*([^<>]*?)\s*>*>", r"\1", text)
    return text


def _dictionary(text: str) -> str:
    for fancy, plain in (("‘", "'"), ("’", "'"), ("“", '"'), ("”", '"'), ("—", "--"), ("–", "-"), ("…", "...")):
        text = text.replace(fancy, plain)
    return text


def _fortunes(text: str) -> str:
    return re.sub(r"(?m)^%\n", "\n", text).replace("\t", "    ")


def _asis(text: str) -> str:
    return text


def _vim(text: str) -> str:
    """Vim's help: marks of links, tags and listings are left out."""
    text = re.sub(r"[|*]([^\s|*]+)[|*]", r"\1", text)
    return re.sub(r"(?m)^<|[ \t]*>$", "", text).replace("\t", "    ")


def _verses(text: str) -> str:
    return re.sub(r"(?m)^\w+\d+:\d+ ", "", text)


KERNEL_GUIDES = ("admin-guide", "core-api", "driver-api", "filesystems", "process", "networking", "locking")
SOURCES = (
    Source("anarchism", ("usr/share/doc/anarchism/html/*.html",), _html, "An Anarchist FAQ: essays"),
    Source("dict-jargon", ("usr/share/dictd/jargon.dict.dz",), _dictionary, "The Jargon File: a lexicon"),
    Source("dict-devil", ("usr/share/dictd/devil.dict.dz",), _dictionary, "The Devil's Dictionary, 1911: satire"),
    Source("fortunes", ("usr/share/games/fortunes/*",), _fortunes, "quotations and jokes"),
    Source("fortunes-min", ("usr/share/games/fortunes/*",), _fortunes, "quotations and riddles"),
    Source("debian-reference-en", ("usr/share/debian-reference/*.en.html",), _html, "Debian Reference: a manual"),
    Source("debian-policy", ("usr/share/doc/debian-policy/policy.html/*.html",), _html, "Debian Policy: rules"),
    Source("harden-doc", ("usr/share/doc/harden-doc/html/en-US/*.html",), _html, "Securing Debian: a manual"),
    Source("git-doc", ("usr/share/doc/git-doc/**/*.html",), _html, "Git: manual pages"),
    Source("perl-doc", ("usr/share/perl/*/pod/*.pod",), _pod, "Perl: tutorials and reference"),
    Source("python3.11-doc", ("usr/share/doc/python3.11/html/**/*.html",), _html, "Python: tutorials and reference"),
    Source(
        "linux-doc-6.1",
        tuple(f"usr/share/doc/linux-doc-6.1/Documentation/{name}/**/*.rst.gz" for name in KERNEL_GUIDES),
        _asis,
        "The Linux kernel: guides",
    ),
    Source("sqlite3-doc", ("usr/share/doc/sqlite3/*.html",), _html, "SQLite: articles and reference"),
    Source("postgresql-doc-15", ("usr/share/doc/postgresql-doc-15/html/*.html",), _html, "PostgreSQL: a manual"),
    Source("gnome-user-docs", ("usr/share/help/C/gnome-help/*.page",), _html, "GNOME: help for beginners"),
    Source("bible-kjv-text", ("verses",), _verses, "The King James Bible, 1611: narrative", True),
    Source("vim-runtime", ("usr/share/vim/vim*/doc/*.txt",), _vim, "Vim: a manual", True),
    Source(
        "developers-reference", ("usr/share/developers-reference/*.html",), _html, "Debian Developer's Reference", True
    ),
)


def read_texts(out: Path) -> tuple[list[Path], list[Path]]:
    """Fetch and clean the texts: files to train on, files held out."""
    made: tuple[list[Path], list[Path]] = ([], [])
    for source in SOURCES:
        path = out / ("held_out" if source.held_out else "train") / f"{source.package}.txt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            text = "\n\n\n".join(_pages(source, out / "packages"))
            text = re.sub(r"[ \t]+\n", "\n", text)
            text = re.sub(r"\n{4,}", "\n\n\n", text)
            encoded = text.encode("utf-8", "ignore")[:LARGEST]
            part = path.with_suffix(".part")
            part.write_text(encoded.decode("utf-8", "ignore"), encoding="utf-8")
            part.rename(path)
        made[source.held_out].append(path)
    return made


def _pages(source: Source, folder: Path) -> Iterator[str]:
    """The pages of a package, evenly chosen where they are more than LARGEST."""
    unpacked = _unpack(source.package, folder)
    if source.package == "bible-kjv-text":
        program = (_unpack("bible-kjv", folder) / "usr/bin/bible").resolve()  # reads the data in the folder it runs in
        done = subprocess.run(
            [program, "-f", "Gen1:1-Rev22:21"], cwd=unpacked / "usr/lib", check=True, capture_output=True
        )
        (unpacked / "verses").write_bytes(done.stdout)
    files = sorted({file for pattern in source.files for file in unpacked.glob(pattern) if file.is_file()})
    pages = []
    for file in files:
        if file.suffix in (".dat", ".u8") or file.is_symlink():  # indexes of fortunes
            continue
        data = file.read_bytes()
        if file.suffix in (".gz", ".dz"):
            data = gzip.decompress(data)
        text = source.read(data.decode("utf-8", "replace")).strip("\n")
        if len(text) >= SHORTEST:
            pages.append(text)
    if not pages:
        raise SystemExit(f"{source.package} has none of the files {', '.join(source.files)}")
    share = min(1.0, LARGEST / sum(len(page.encode()) for page in pages)) if len(pages) > 1 else 1.0
    return (page for number, page in enumerate(pages) if int((number + 1) * share) > int(number * share))


def _unpack(package: str, folder: Path) -> Path:
    unpacked = folder / package
    if not unpacked.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if not list(folder.glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True)
        (archive,) = folder.glob(f"{package}_*.deb")
        part = folder / f"{package}.part"
        subprocess.run(["dpkg-deb", "-x", archive, part], check=True)
        part.rename(unpacked)
    return unpacked


def main() -> None:
    """Write the texts and say how large they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder for packages and texts")
    for files in read_texts(parser.parse_args().out):
        for file in files:
            print(f"{file}  {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
