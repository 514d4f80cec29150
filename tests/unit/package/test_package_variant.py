"""A package with another graph, where its files are links, and where its path is no text."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import copy_package, random_tokens

from trimkv_export.build.builder import build_package
from trimkv_export.config import BuildOptions
from trimkv_export.errors import CheckpointError, OptionError, PackageError
from trimkv_export.evaluation import Text, evaluate
from trimkv_export.package import DECODER, Package
from trimkv_export.package.variant import variant_folder
from trimkv_export.runtime import Engine
from trimkv_export.verify import check_package

NOT_TEXT = os.fsdecode(b"not \xff text")


def hub_cache(package: Path, home: Path) -> Path:
    """As the hub's cache has a repository: links from a snapshot to blobs."""
    snapshot = home / "snapshots" / "0123"
    (home / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(file for file in package.rglob("*") if file.is_file())):
        link = snapshot / file.relative_to(package)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, home / "blobs" / str(number))
        link.symlink_to(os.path.relpath(home / "blobs" / str(number), link.parent))
    return snapshot


def mounted(package: Path, home: Path) -> Path:
    """As Kubernetes mounts a volume: links through a link to a folder of the day."""
    copy_package(package, home / "..2026")
    (home / "..data").symlink_to("..2026")
    for file in (home / "..2026").iterdir():
        (home / file.name).symlink_to(Path("..data") / file.name)
    return home


@pytest.mark.parametrize("layout", [hub_cache, mounted])
def test_files_that_are_links(package: Path, tmp_path: Path, layout: object) -> None:
    folder = layout(package, tmp_path / "home")  # type: ignore[operator]
    text = [Text("".join(chr(97 + token % 26) for token in random_tokens(30)))]
    found, wanted = (evaluate(path, text, budgets=[4, 12], threads=1) for path in (folder, package))
    assert [result.perplexity for result in found] == [result.perplexity for result in wanted]
    assert check_package(folder).passed
    assert not list(tmp_path.rglob(".*-*"))


def test_a_variant_holds_the_same_files(package: Path) -> None:
    opened = Package.open(package)
    decoder = (package / DECODER).read_bytes()
    config = replace(opened.config, device="elsewhere")
    with variant_folder(opened, config, {DECODER: decoder}, "test", "nothing") as folder:
        found = Package.open(folder).config
        assert found.device == "elsewhere"
        assert set(found.files) == set(opened.config.files) - {"memory_plan.json"}
        assert (folder / "decoder.onnx.data").samefile(package / "decoder.onnx.data")
    assert not folder.exists()


def test_a_path_that_is_no_text(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No runtime takes one; below such a folder a package can still be named."""
    bad = copy_package(package, tmp_path / NOT_TEXT / "package")
    for work in (Package.open, Engine.open, check_package, lambda path: evaluate(path, [Text("text")])):
        with pytest.raises(PackageError, match=r"\\udcff text/package': is not UTF-8 text, and no runtime can open"):
            work(bad)
    monkeypatch.chdir(bad.parent)
    assert evaluate(Path("package"), [Text("some text")], ["recent"], [4], threads=1)[0].perplexity
    assert check_package(Path("package")).passed


def test_builds_from_and_to_paths_that_are_no_text(checkpoint: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "model": str(checkpoint / "base"),
        "gates": str(checkpoint / "gates"),
        "output": tmp_path / "package",
    }
    other = shutil.copytree(checkpoint, tmp_path / NOT_TEXT)
    for name, value in (("model", f"{other}/base"), ("gates", f"{other}/gates"), ("output", other / "package")):
        with pytest.raises(OptionError, match=rf"{name} is not UTF-8 text: .*\\udcff text"):
            build_package(BuildOptions(budget=8, **given | {name: value}))
    source = shutil.copytree(checkpoint, tmp_path / "source")
    weights = source / "base" / "model.safetensors"
    weights.rename(weights.with_name(f"{NOT_TEXT}.safetensors"))
    with pytest.raises(CheckpointError, match=r"the name of a weight file is not UTF-8 text: 'not \\udcff text"):
        build_package(BuildOptions(budget=8, **given | {"model": str(source / "base")}))
    assert not (tmp_path / "package").exists()
