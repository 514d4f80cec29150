"""Fixtures of several folders. What they return is shared: a test copies a package before it changes it."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import fake_tensorrt
import hypothesis
import pytest
from support import KERNELS, MAX_IMAGE_TOKENS, NATIVE_MODE, Cli, Result, build, make_checkpoint, make_visual_checkpoint

from trimkv_export.backends import tensorrt as tensorrt_library
from trimkv_export.cli import main
from trimkv_export.runtime import Engine, Session

# No test depends on time.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bf16 checkpoint with rg10 gates: base/ and gates/."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def package(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its fp32 package: budget 8, evict every 4, steps of up to 16 tokens."""
    return build(checkpoint, tmp_path_factory.mktemp("package") / "small").path


@pytest.fixture(scope="session")
def visual_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen3-VL checkpoint, as `checkpoint`; its pictures have a token per 32 x 32 pixels."""
    return make_visual_checkpoint(tmp_path_factory.mktemp("visual_checkpoint"))


@pytest.fixture(scope="session")
def visual_package(visual_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its package, as `package`; images of at most 40 tokens."""
    output = tmp_path_factory.mktemp("visual_package") / "small"
    return build(visual_checkpoint, output, max_image_tokens=MAX_IMAGE_TOKENS).path


@pytest.fixture(params=KERNELS)
def engine(package: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """An engine with four rows, with portable bodies and with native kernels."""
    with Engine.open(package, native=NATIVE_MODE[request.param], max_sessions=4, threads=1) as engine:
        yield engine


@pytest.fixture
def session(engine: Engine) -> Session:
    """An empty session of `engine`."""
    return engine.session()


@pytest.fixture
def tensorrt(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in for TensorRT, and a plugin library that it takes: its file."""
    library = tmp_path_factory.mktemp("native") / tensorrt_library.PLUGIN
    library.write_bytes(b"plugins")
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt)
    monkeypatch.setattr(tensorrt_library, "FOLDER", library.parent)
    for name, empty in (("UNKNOWN_OPERATORS", set()), ("LOADED", []), ("BUILT", [])):
        monkeypatch.setattr(fake_tensorrt, name, empty)
    return library


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run one command in this process; an exception that `main` lets through fails the test."""

    def run(*arguments: object, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        code: object = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as error:
            code = error.code
        captured = capsys.readouterr()
        assert isinstance(code, int)
        return Result(code, captured.out, captured.err)

    return run
