"""Tests of the real tritonserver: `make test-triton`. Where its client is not installed they are left out."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from triton_server import TritonServer

    from trimkv_export.runtime import Engine

AVAILABLE = importlib.util.find_spec("tritonclient") is not None
collect_ignore_glob = [] if AVAILABLE else ["test_*.py"]


@pytest.fixture(scope="session")
def folder() -> Path:
    """What make_env.sh made."""
    return Path(os.environ.get("TRIMKV_TRITON", "build/triton")).absolute()


@pytest.fixture(scope="session")
def package(folder: Path) -> Path:
    return folder / "demo" / "package"


@pytest.fixture(scope="session")
def repository(folder: Path, package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from triton_server import write_model

    repository = tmp_path_factory.mktemp("triton") / "repository"
    write_model(repository, package, folder / "model", queue_limit=600, max_tokens=2000)
    return repository


@pytest.fixture(scope="module")
def server(folder: Path, repository: Path) -> "Iterator[TritonServer]":
    """A running server."""
    from triton_server import TritonServer

    with TritonServer(folder, repository) as server:
        yield server


@pytest.fixture(scope="session")
def reference(package: Path) -> "Iterator[Engine]":
    """An engine in this process, for single runs."""
    from trimkv_export.runtime import Engine

    with Engine.open(package, threads=1) as engine:
        yield engine
