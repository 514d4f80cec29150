"""A package with other graphs, for as long as it is looked at: its other files are not copied where that can be."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from trimkv_export.errors import OutputError, PackageError
from trimkv_export.files import emptied, link_or_copy
from trimkv_export.package.package import CONFIG, PLAN, Package, PackageConfig, hash_file, require_utf8

__all__ = ["variant_folder"]


@contextlib.contextmanager
def variant_folder(
    package: Package, config: PackageConfig, graphs: Mapping[str, bytes], purpose: str, what: str
) -> Iterator[Path]:
    """Yield a folder with a package's files, other graphs and another config.json; it is removed afterwards.

    It lies next to the package, whose other files are hard links there; where that cannot be, it is a copy in the
    system's folder for temporary files.

    Args:
        package: the package.
        config: of the new one; its `files` are replaced.
        graphs: name -> content of those that differ.
        purpose: part of the folder's name, such as "eval".
        what: what of it differs, for an error.

    Raises:
        OutputError: the folder cannot be written.
    """
    # Hashes of memory_plan.json would be right, its numbers not.
    others = {name: entry for name, entry in package.config.files.items() if name not in (*graphs, PLAN)}
    with _folder_beside(package.path, purpose) as folder:
        try:
            written = {}
            for name, content in graphs.items():
                emptied(folder / name).write_bytes(content)
                written[name] = {"bytes": len(content), "sha256": hash_file(folder / name)}
            for name in others:
                link_or_copy(package.path / name, folder / name)
            emptied(folder / CONFIG).write_bytes(replace(config, files=others | written).dump())
        except OSError as error:
            raise OutputError(
                f"{folder}: the package cannot be written with {what}: {error.strerror or error}"
            ) from None
        yield folder


@contextlib.contextmanager
def _folder_beside(package: Path, purpose: str) -> Iterator[Path]:
    package = package.resolve()
    try:
        require_utf8(package)  # the path may have been given relative to a folder whose name is not
        folder = tempfile.TemporaryDirectory(prefix=f".{package.name}.{purpose}-", dir=package.parent)
    except (OSError, PackageError):
        folder = tempfile.TemporaryDirectory(prefix=f"trimkv-{purpose}-")
    with folder as path:
        yield Path(path)
