"""Files that people name."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from trimkv_export.errors import OptionError, OutputError, PackageError
from trimkv_export.files import read_json_object, read_text, require_writable


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder", "folder: is a folder: name a file in it"),
        ("nosuch/plan.png", "there is no folder .*nosuch; make it first"),
        ("file/plan.png", "cannot be written: Not a directory"),
        ("n" * 300, "cannot be written: File name too long"),
        ("nul\0byte", "cannot be written: .*null"),
        ("locked/plan.png", "cannot be written: permission denied"),
        ("read-only", "cannot be written: permission denied"),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    for folder in ("folder", "locked"):
        (tmp_path / folder).mkdir()
    for file in ("file", "read-only"):
        (tmp_path / file).touch()
    refused = {tmp_path / "locked", tmp_path / "read-only"}  # a root user's access has no such limits
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path not in refused and access(path, mode))
    with pytest.raises(OutputError, match=message):
        require_writable(tmp_path / name)


def test_nothing_is_created(tmp_path: Path) -> None:
    require_writable(tmp_path / "new.png")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old.png").write_bytes(b"kept")
    require_writable(tmp_path / "old.png")
    assert (tmp_path / "old.png").read_bytes() == b"kept"


def test_json_that_need_not_be_there(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    assert read_json_object(file, PackageError, "copy it", optional=True) == {}
    with pytest.raises(PackageError, match=r"a\.json: cannot be read \(No such file or directory\)"):
        read_json_object(file, PackageError, "copy it")
    file.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(PackageError, match=r"a\.json: is not JSON .*: copy it$"):
        read_json_object(file, PackageError, "copy it", optional=True)
    file.write_text("[1]")
    with pytest.raises(PackageError, match=r"a\.json: is a JSON list, not an object: copy it$"):
        read_json_object(file, PackageError, "copy it", optional=True)


@pytest.mark.parametrize("make", [lambda path: os.mkfifo(path), lambda path: path.symlink_to("/dev/full")])
def test_devices_and_pipes_are_not_written(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "out")
    with pytest.raises(OutputError, match="out: is a device or a pipe: name an ordinary file"):
        require_writable(tmp_path / "out")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbf\xef\xbb\xbfab\xef\xbb\xbf\n")
    assert read_text(file, "--text") == "\ufeffab\ufeff\n"  # the first one only, and no newline is lost
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json_object(file, OptionError, "mend it") == {"a": 1}


def test_deep_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text('{"a": ' * 100_000)
    with pytest.raises(OptionError, match=r"deep\.json: is not JSON"):
        read_json_object(tmp_path / "deep.json", OptionError, "mend it")
