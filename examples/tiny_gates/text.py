"""The text that the small model learns from: three books in the public domain, out of Debian packages.

    King James Bible      bible-kjv-text (read with the program of bible-kjv)    1611, copyright expired
    The Jargon File       dict-jargon, version 4.4.7                             public domain
    The Devil's Dictionary dict-devil, Ambrose Bierce, 1911                      copyright expired

`apt-get download` needs no root: the packages are unpacked into a folder of their own and not installed.
"""

import gzip
import re
import subprocess
from pathlib import Path

__all__ = ["read_text"]

PACKAGES = ("bible-kjv", "bible-kjv-text", "dict-jargon", "dict-devil")
HELD_OUT_EVERY = 16  # one piece of PIECE sentences in 16 is never trained on
PIECE = 200
LONGEST_SENTENCE = 400  # characters; longer ones are tables and lists


def read_text(folder: Path) -> tuple[list[str], list[str]]:
    """Fetch and clean the books: (sentences to train on, sentences held out), both in reading order.

    folder: where packages are downloaded to and unpacked, kept for the next time.
    """
    train: list[str] = []
    held_out: list[str] = []
    for book in _books(folder):
        found = _sentences(book)
        for number, start in enumerate(range(0, len(found), PIECE)):
            (held_out if number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else train).extend(found[start : start + PIECE])
    return train, held_out


def _sentences(text: str) -> list[str]:
    """Split text into sentences, with single spaces."""
    flat = re.sub(r"\s+", " ", text)
    return [part for part in re.split(r"(?<=[.!?;:]) ", flat) if 8 <= len(part) <= LONGEST_SENTENCE]


def _books(folder: Path) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        unpacked = folder / package
        if not unpacked.exists():
            subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True)
            (archive,) = folder.glob(f"{package}_*.deb")
            subprocess.run(["dpkg-deb", "-x", archive, unpacked], check=True)
    program = (folder / "bible-kjv/usr/bin/bible").resolve()  # reads the data in the folder where it runs
    data = folder / "bible-kjv-text/usr/lib"
    verses = subprocess.run([program, "-f", "Gen1:1-Rev22:21"], cwd=data, check=True, capture_output=True, text=True)
    dictionaries = [_plain(folder / f"dict-{name}/usr/share/dictd/{name}.dict.dz") for name in ("jargon", "devil")]
    return [re.sub(r"(?m)^\w+\d+:\d+ ", "", verses.stdout), *dictionaries]


def _plain(path: Path) -> str:
    """A dictionary's text, in ASCII: its quotes and dashes have plain equals."""
    text = gzip.decompress(path.read_bytes()).decode("utf-8")
    for fancy, plain in (("‘", "'"), ("’", "'"), ("“", '"'), ("”", '"'), ("—", "--"), ("–", "-"), ("…", "...")):
        text = text.replace(fancy, plain)
    return text.encode("ascii", "ignore").decode()
