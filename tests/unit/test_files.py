"""Files that people name, and files of strangers."""

import os
from pathlib import Path

import pytest

from trimkv_export.errors import CheckpointError, OptionError, OutputError, PackageError
from trimkv_export.files import (
    emptied,
    link_or_copy,
    read_json_object,
    read_text,
    read_yaml,
    require_writable,
    writable,
)


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


def test_devices_and_pipes_are_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/full")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for path, said in (
        (Path("/dev/full"), "is a device or a pipe: name an ordinary file"),
        (tmp_path / "link", "is a device or a pipe: name an ordinary file"),
        (tmp_path / "pipe", "is a device or a pipe: name an ordinary file"),
        (tmp_path / "dangling", "is a symbolic link to nothing"),
    ):
        with pytest.raises(OutputError, match=said):
            require_writable(path)
        with pytest.raises(OutputError, match=said), writable(path, "it cannot be saved") as file:
            file.write(b"x")
    assert Path("/dev/full").is_char_device()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "link", "pipe"]


def test_a_file_appears_whole_or_stays(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_bytes(b"old")
    file.chmod(0o640)
    link.symlink_to(file)

    def fail() -> None:
        with writable(link, "it cannot be saved") as out:
            out.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert file.read_bytes() == b"old"
    with writable(link, "it cannot be saved") as out:
        out.write(b"new")
    assert (file.read_bytes(), file.stat().st_mode & 0o777, link.is_symlink()) == (b"new", 0o640, True)
    with writable(tmp_path / ("n" * 255), "it cannot be saved", mode=0o600) as out:
        out.write(b"x")
    assert (tmp_path / ("n" * 255)).stat().st_mode & 0o777 == 0o600
    assert len(list(tmp_path.iterdir())) == 3


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    """A pipe that nobody writes to would keep its reader waiting; one of the shell's is read."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(OptionError, match="cannot be read"):
            read_text(path, "--text")
        with pytest.raises(OptionError, match="cannot be read"):
            read_yaml(path)
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_json_object(path, CheckpointError, "fetch it again")
    reader, writer = os.pipe()
    os.write(writer, b"text")
    os.close(writer)
    assert read_text(Path(f"/dev/fd/{reader}"), "--text") == "text"
    os.close(reader)


def test_deep_json(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="is not JSON"):
        read_json_object(tmp_path / "deep.json", CheckpointError, "fetch it again")


def test_what_is_linked_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("precious")
    link_or_copy(tmp_path / "theirs", tmp_path / "ours")
    emptied(tmp_path / "ours").write_text("new")
    assert (tmp_path / "theirs").read_text() == "precious"
    (tmp_path / "other").write_text("other")
    link_or_copy(tmp_path / "other", tmp_path / "theirs")
    assert (tmp_path / "theirs").read_text() == "other"


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


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbf\xef\xbb\xbfab\xef\xbb\xbf\n")
    assert read_text(file, "--text") == "\ufeffab\ufeff\n"  # the first one only, and no newline is lost
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json_object(file, OptionError, "mend it") == {"a": 1}
