"""A package appears whole or not at all: overwriting, full disks, killed and simultaneous builds."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import build, make_checkpoint

from trimkv_export.build import builder as onnxruntime_module
from trimkv_export.build import weights as weights_module
from trimkv_export.errors import CheckpointError, OutputError
from trimkv_export.package import Package, is_package
from trimkv_export.package.staging import staged_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_overwriting(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "package"
    first = build(checkpoint, target).config.digest
    with pytest.raises(OutputError, match="exists already; choose another --output, or pass --overwrite"):
        build(checkpoint, target, budget=5)
    assert Package.open(target).config.digest == first
    build(checkpoint, target, budget=5, overwrite=True)
    assert Package.open(target).config.eviction.budget == 5
    assert names(target.parent) == ["package"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_what_is_no_package_is_never_overwritten(checkpoint: Path, tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "folder", "dangling"):
        with pytest.raises(OutputError, match=f"{name}: exists already; choose another --output"):
            build(checkpoint, tmp_path / name, overwrite=overwrite)
    assert (tmp_path / "folder" / "thesis.tex").read_text() == (tmp_path / "file").read_text() == "mine"
    assert names(tmp_path) == ["dangling", "file", "folder"]


@pytest.mark.parametrize("name", ["notes.txt", "results/recall.json", "chat_template.jinja.mine"])
def test_what_somebody_put_into_a_package_is_not_deleted(checkpoint: Path, tmp_path: Path, name: str) -> None:
    target = build(checkpoint, tmp_path / "package").path
    (target / name).parent.mkdir(exist_ok=True)
    (target / name).write_text("mine")
    with pytest.raises(OutputError, match=f"holds '{name.split('/')[0]}', which trimkv-export did not write .*; move"):
        build(checkpoint, target, overwrite=True)
    assert (target / name).read_text() == "mine"
    (target / name).unlink()
    if "/" in name:
        (target / name).parent.rmdir()
    (target / ".cache").mkdir()  # of a program that copied it
    (target / "decoder.onnx").unlink()
    Package.open(build(checkpoint, target, overwrite=True).path)


def test_a_package_with_a_damaged_list_is_replaced(checkpoint: Path, tmp_path: Path) -> None:
    target = build(checkpoint, tmp_path / "package").path
    (target / "config.json").write_text('{"format": "trimkv-export", "files": 3}')
    Package.open(build(checkpoint, target, overwrite=True).path)


def test_an_empty_folder_is_taken(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    Package.open(build(checkpoint, tmp_path / "empty").path)
    assert names(tmp_path) == ["empty"]


def test_a_relative_output(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    build(checkpoint, Path("here"))
    Package.open("here")
    assert names(tmp_path) == ["here"]


def test_a_parent_that_is_a_file(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot be written: (Not a directory|File exists)"):
        build(checkpoint, tmp_path / "file" / "package")


def test_a_failed_build_keeps_the_old_package(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "package"
    digest = build(checkpoint, target).config.digest

    def fail_halfway() -> None:
        with staged_folder(target, overwrite=True, ours=is_package) as stage:
            (stage / "half").touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_halfway()
    assert Package.open(target).config.digest == digest
    assert names(tmp_path) == ["package"]


def test_a_bad_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "checkpoint")
    file = source / "base" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError):
        build(source, tmp_path / "package")
    assert names(tmp_path) == ["checkpoint"]


def test_a_checkpoint_that_shrinks_while_it_is_read(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    place = weights_module.place_weights

    def shrink(*args: Any) -> Any:
        os.truncate(source / "base" / "model.safetensors", 5000)
        return place(*args)

    monkeypatch.setattr(onnxruntime_module, "place_weights", shrink)
    with pytest.raises(CheckpointError, match=r"model.safetensors: became shorter while it was read, at byte 5,000"):
        build(source, tmp_path / "package")
    assert names(tmp_path) == ["checkpoint"]


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail(*_: object, **__: object) -> Any:
    raise FULL


@pytest.mark.parametrize(
    ("owner", "attribute"),
    [
        (weights_module._DataFile, "_write"),
        (Path, "write_bytes"),
        (Path, "write_text"),
        (Path, "mkdir"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_full_disk_at_any_point(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, attribute: str, precision: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, fail)
        with pytest.raises(OutputError, match="package: the disk is full") as caught:
            build(checkpoint, tmp_path / "package", precision=precision)
    assert caught.value.__cause__ is None
    assert names(tmp_path) == []
    build(checkpoint, tmp_path / "package", precision=precision)


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_really_full_disk(checkpoint: Path, tmp_path: Path, precision: str) -> None:
    report = build(checkpoint, tmp_path / "package", precision=precision).as_dict()
    weights, whole = report["weight_bytes"], report["package_bytes"]
    sizes = {weights // 2: "needs .* bytes", weights + 40_000: "the disk is full", whole - 9000: "the disk is full"}
    for size, said in sizes.items():
        with small_disk(tmp_path / f"disk{size}", size) as disk:
            with pytest.raises(OutputError, match=said):
                build(checkpoint, disk / "package", precision=precision)
            assert names(disk) == []


BUILD = """
import sys
from pathlib import Path
from trimkv_export.config import BuildOptions
from trimkv_export.build import weights
from trimkv_export.build.builder import build_package
weights.CHUNK_BYTES = 4096
base, gates = (str(Path(sys.argv[1]) / name) for name in ("base", "gates"))
options = BuildOptions(base, 8, gates=gates, output=Path(sys.argv[2]), evict_every=4, overwrite=True)
"""
SLOW_BUILD = BUILD + "build_package(options, lambda *_: print(flush=True) or sys.stdin.readline())"
MANY_BUILDS = BUILD + "while True: print(build_package(options), flush=True)"


def start(code: str, checkpoint: Path, output: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", code, str(checkpoint), str(output)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@contextlib.contextmanager
def slow_build(checkpoint: Path, output: Path) -> Iterator["subprocess.Popen[str]"]:
    """A build in another process that waits for a line after each 4 kB of weights."""
    with start(SLOW_BUILD, checkpoint, output) as process:
        try:
            yield process
        finally:
            process.kill()


def advance(process: "subprocess.Popen[str]", chunks: int) -> None:
    assert process.stdin
    assert process.stdout
    process.stdout.readline()
    for _ in range(chunks):
        process.stdin.write("\n")
        process.stdin.flush()
        process.stdout.readline()


@pytest.mark.parametrize(("chunks", "exists"), [(0, False), (9, False), (14, True)])
def test_a_killed_build(checkpoint: Path, tmp_path: Path, chunks: int, exists: bool) -> None:
    target = tmp_path / "package"
    if exists:
        build(checkpoint, target, budget=5)
    with slow_build(checkpoint, target) as process:
        advance(process, chunks)
        stages = [name for name in names(tmp_path) if name != "package"]
        assert len(stages) == 1
        assert stages[0].startswith(".package.building-")
        with contextlib.suppress(OutputError):  # a build beside it leaves the living stage alone
            build(checkpoint, tmp_path / "other")
        assert stages[0] in names(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert stages[0] in names(tmp_path)
    assert target.exists() == exists
    if exists:
        assert Package.open(target).config.eviction.budget == 5
    build(checkpoint, target, overwrite=True)
    assert Package.open(target).config.eviction.budget == 8
    assert names(tmp_path) == ["other", "package"]


@pytest.mark.parametrize("delay", [0.0, 0.017, 0.043])
def test_killed_at_any_moment(checkpoint: Path, tmp_path: Path, delay: float) -> None:
    """What is there under the package's name opens, and the next build leaves nothing else."""
    with start(MANY_BUILDS, checkpoint, tmp_path / "package") as process:
        assert process.stdout
        for _ in range(3):
            assert process.stdout.readline()
        time.sleep(delay)
        process.kill()
    if (tmp_path / "package").exists():
        Package.open(tmp_path / "package")
    build(checkpoint, tmp_path / "package", overwrite=True)
    assert names(tmp_path) == ["package"]


def test_a_name_that_looks_like_a_pattern(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "m[8]"
    abandoned = tmp_path / ".m[8].building-old"
    abandoned.mkdir()
    (tmp_path / ".m8.building-other").mkdir()  # not ours
    build(checkpoint, target)
    assert names(tmp_path) == [".m8.building-other", "m[8]"]


def test_what_appears_during_a_build_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "package"

    def write() -> None:
        with staged_folder(target, overwrite=False, ours=is_package) as stage:
            (stage / "config.json").touch()
            target.mkdir()
            (target / "thesis.tex").write_text("mine")

    with pytest.raises(OutputError, match="exists already"):
        write()
    assert names(target) == ["thesis.tex"]
    assert names(tmp_path) == ["package"]


def test_a_package_set_aside_by_a_killed_build_comes_back(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "package"
    digest = build(checkpoint, target).config.digest
    aside = tmp_path / f".{target.name}.building-killed"
    aside.mkdir()
    target.rename(aside / "old")  # killed here, between the two renames
    with pytest.raises(RuntimeError, match="stop"), staged_folder(target, overwrite=True, ours=is_package):
        raise RuntimeError("stop")
    assert Package.open(target).config.digest == digest
    assert names(tmp_path) == ["package"]


def test_a_stale_stage_that_goes_away_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another build has finished, or removed it, between the listing and the look."""
    monkeypatch.setattr(Path, "glob", lambda *_: iter([tmp_path / ".package.building-gone"]))
    with staged_folder(tmp_path / "package", overwrite=False, ours=is_package) as stage:
        (stage / "config.json").touch()
    assert names(tmp_path) == ["package"]


def test_an_overwrite_that_fails_at_the_last_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "package"
    target.mkdir()
    (target / "config.json").write_text('{"format": "trimkv-export"}')
    rename = Path.rename

    def fail(self: Path, to: Path) -> Path:
        if self.name.startswith(".package.building-"):
            raise FULL
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail)
    with (
        pytest.raises(OutputError, match="the disk is full"),
        staged_folder(target, overwrite=True, ours=is_package) as stage,
    ):
        (stage / "config.json").write_text("new")
    assert (target / "config.json").read_text() == '{"format": "trimkv-export"}'


@pytest.mark.parametrize("same", [True, False])
def test_two_builds_at_once(checkpoint: Path, tmp_path: Path, same: bool) -> None:
    targets = [tmp_path / "package", tmp_path / ("package" if same else "package-2")]
    ready, failures = threading.Barrier(2), []

    def work(target: Path) -> None:
        try:
            with staged_folder(target, overwrite=True, ours=is_package) as stage:
                ready.wait(10)
                built = build(checkpoint, stage / "inner").path
                for file in built.iterdir():
                    file.rename(stage / file.name)
                built.rmdir()
        except OutputError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failures) <= same
    assert names(tmp_path) == sorted({target.name for target in targets})
    for target in targets:
        Package.open(target)


def test_permissions_of_the_package(package: Path) -> None:
    assert package.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("where", ["base", "gates"])
@pytest.mark.parametrize("relation", ["is", "holds", "lies in"])
def test_the_checkpoint_is_never_replaced(tmp_path: Path, where: str, relation: str) -> None:
    source = make_checkpoint(tmp_path / "checkpoint")
    before = {file: file.read_bytes() for file in source.rglob("*") if file.is_file()}
    target = {"is": source / where, "holds": source, "lies in": source / where / "package"}[relation]
    with pytest.raises(OutputError, match=f"{relation} the checkpoint's folder"):
        build(source, target, overwrite=True)
    assert {file: file.read_bytes() for file in source.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    "content",
    [b'{"model_type": "qwen3"}', b"{}", b"not JSON", b'["trimkv-export"]', b'{"format": "other"}', None],
)
def test_a_folder_of_others_is_never_replaced(checkpoint: Path, tmp_path: Path, content: bytes | None) -> None:
    target = tmp_path / "theirs"
    target.mkdir()
    (target / "precious").write_text("x")
    if content is not None:
        (target / "config.json").write_bytes(content)
    with pytest.raises(OutputError, match="trimkv-export did not write it"):
        build(checkpoint, target, overwrite=True)
    assert (target / "precious").read_text() == "x"


def test_a_package_that_was_changed_may_be_replaced(checkpoint: Path, tmp_path: Path) -> None:
    target = build(checkpoint, tmp_path / "package").path
    config = json.loads((target / "config.json").read_bytes())
    (target / "config.json").write_text(json.dumps(config | {"prefill_chunk": 3}))
    Package.open(build(checkpoint, target, overwrite=True).path)


RACE = """
import sys
from pathlib import Path
from trimkv_export.errors import OutputError
from trimkv_export.package import is_package
from trimkv_export.package.staging import staged_folder
done = 0
for _ in range(60):
    with staged_folder(Path(sys.argv[2]), overwrite=True, ours=is_package) as stage:
        (stage / "config.json").write_text('{"format": "trimkv-export"}')
    done += 1
print(done)
"""


def test_many_builds_at_once(tmp_path: Path) -> None:
    """Each of them succeeds, for each may overwrite what the others wrote."""
    processes = [start(RACE, tmp_path, tmp_path / "package") for _ in range(6)]
    assert [process.communicate()[0].strip() for process in processes] == ["60"] * 6
    assert names(tmp_path) == ["package"]
    assert is_package(tmp_path / "package")


@pytest.mark.parametrize("length", [200, 201, 255])
def test_a_long_name(tmp_path: Path, length: int) -> None:
    target = tmp_path / ("n" * length)
    for _ in range(2):
        with staged_folder(target, overwrite=True, ours=is_package) as stage:
            (stage / "config.json").write_text('{"format": "trimkv-export"}')
    assert names(tmp_path) == [target.name]
    with (
        pytest.raises(OutputError, match="cannot be written: File name too long"),
        staged_folder(tmp_path / ("n" * 256), overwrite=True, ours=is_package),
    ):
        pass


TERMINATED = """
import sys
from trimkv_export.build import weights
from trimkv_export.cli import main
weights.CHUNK_BYTES = 4096
place = weights.place_weights
import trimkv_export.build.builder as builder
def slowly(*args, **kwargs):
    print("writing", flush=True)
    sys.stdin.readline()
    return place(*args, **kwargs)
builder.place_weights = slowly
main(["build", "--model", sys.argv[1] + "/base", "--gates", sys.argv[1] + "/gates", "--budget", "8",
      "--output", sys.argv[2]])
"""


def test_a_terminated_build_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    with start(TERMINATED, checkpoint, tmp_path / "package") as process:
        assert process.stdout
        assert "writing" in process.stdout.readline()
        assert len(names(tmp_path)) == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143
    assert names(tmp_path) == []
