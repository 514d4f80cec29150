"""The TensorRT backend on stand-ins for TensorRT and CUDA (tests/fake_tensorrt.py), against ONNX Runtime itself."""

import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_tensorrt
import numpy as np
import pytest
from fake_tensorrt import CudaRuntime
from pictures import picture
from seeing import FAMILIES, make_seeing_checkpoint
from support import GOLDEN, IMAGE, MAX_IMAGE_TOKENS, build, build_case, make_checkpoint, random_tokens

from trimkv_export.backends import tensorrt as tensorrt_library
from trimkv_export.backends.native import find_library
from trimkv_export.config import Target
from trimkv_export.errors import EngineError, MissingDependencyError, OptionError
from trimkv_export.runtime import Engine
from trimkv_export.runtime import tensorrt as backend_module
from trimkv_export.verify import replay_case

ROWS = 3
NATIVE = find_library() is not None
needs_native = pytest.mark.skipif(not NATIVE, reason="the portable bodies take one row: make plugins")

Build = Callable[..., Path]


@pytest.fixture(scope="module")
def make(checkpoint: Path, visual_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Build]:
    """Builds a package with TensorRT engines."""
    folder = tmp_path_factory.mktemp("tensorrt")
    (folder / tensorrt_library.PLUGIN).write_bytes(b"plugins")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", fake_tensorrt)
        patch.setattr(tensorrt_library, "FOLDER", folder)

        def built(name: str, *, visual: bool = False, **changes: Any) -> Path:
            seen = changes.pop("checkpoint", visual_checkpoint)
            if not (folder / name).exists():
                options = {"max_image_tokens": MAX_IMAGE_TOKENS} if visual else {}
                build(
                    seen if visual else checkpoint, folder / name,
                    target=Target.TENSORRT, max_batch=ROWS, **options | changes,
                )  # fmt: skip
            return folder / name

        yield built


@pytest.fixture
def text(make: Build) -> Path:
    return make("text")


@pytest.fixture
def visual(make: Build) -> Path:
    return make("visual", visual=True)


@pytest.fixture
def cuda(tensorrt: Path, monkeypatch: pytest.MonkeyPatch) -> CudaRuntime:
    runtime = CudaRuntime()
    monkeypatch.setattr(backend_module, "import_cuda", lambda: runtime)
    return runtime


def test_a_conversation_is_that_of_onnx_runtime(text: Path, cuda: CudaRuntime) -> None:
    prompt, more = random_tokens(45), random_tokens(30, seed=1)
    with Engine.open(text, "tensorrt") as engine, Engine.open(text, threads=1) as reference:
        assert engine.native
        assert engine.cache_bytes == reference.cache_bytes
        ours, theirs = engine.session(), reference.session()
        np.testing.assert_allclose(ours.prefill(prompt), theirs.prefill(prompt), atol=1e-5)
        for token in more:
            np.testing.assert_allclose(ours.step([token]), theirs.step([token]), atol=1e-5)
        assert ours.evictions == theirs.evictions > 0
        np.testing.assert_array_equal(ours.kept(), theirs.kept())
        ours.reset()
        theirs.reset()
        np.testing.assert_allclose(ours.step(more[:7]), theirs.step(more[:7]), atol=1e-5)
        assert list(ours.generate([1], 5, stop_ids=frozenset())) == list(theirs.generate([1], 5, stop_ids=frozenset()))


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(("precision", "size"), [("int4", 64), ("int8", 32)])
def test_quantised_weights(tmp_path: Path, precision: str, size: int) -> None:
    checkpoint = make_checkpoint(tmp_path, hidden=64, intermediate=128, heads=4, kv_heads=2, head_dim=16)
    package = build(
        checkpoint, tmp_path / "package", target=Target.TENSORRT, precision=precision, block_size=size,
        activations="fp32",
    ).path  # fmt: skip
    prompt = random_tokens(45)
    with Engine.open(package, "tensorrt") as engine, Engine.open(package, threads=1) as reference:
        np.testing.assert_allclose(engine.session().prefill(prompt), reference.session().prefill(prompt), atol=1e-5)


@needs_native
def test_sessions_side_by_side(text: Path, cuda: CudaRuntime) -> None:
    with (
        Engine.open(text, "tensorrt", max_sessions=ROWS) as engine,
        Engine.open(text, max_sessions=ROWS, threads=1) as reference,
    ):
        ours, theirs = ([e.session() for _ in range(ROWS)] for e in (engine, reference))
        for step in range(12):
            parts = [random_tokens(1 if step % 4 or row else 9, seed=10 * step + row) for row in range(ROWS)]
            found = engine.step_many(list(zip(ours, parts, strict=True))[: 1 + step % ROWS])
            wanted = reference.step_many(list(zip(theirs, parts, strict=True))[: 1 + step % ROWS])
            for one, other in zip(found, wanted, strict=True):
                np.testing.assert_allclose(one, other, atol=1e-5)
        for row in range(ROWS):
            np.testing.assert_array_equal(ours[row].kept(), theirs[row].kept())


def test_pictures(visual: Path, cuda: CudaRuntime) -> None:
    tokens, images = [1, IMAGE, 2, 3, IMAGE, 4], [picture(64, 96), picture(128, 64, seed=1)]
    with Engine.open(visual, "tensorrt") as engine, Engine.open(visual, threads=1) as reference:
        ours, theirs = engine.session(), reference.session()
        np.testing.assert_allclose(ours.prefill(tokens, images), theirs.prefill(tokens, images), atol=1e-4)
        for token in random_tokens(12):
            np.testing.assert_allclose(ours.step([token]), theirs.step([token]), atol=1e-4)
        np.testing.assert_array_equal(ours.kept(), theirs.kept())
    with Engine.open(visual, "tensorrt", vision=False) as engine, engine.session() as session:
        assert engine.vision is None
        session.prefill([1, 2, 3])
        with pytest.raises(EngineError, match="without its vision tower"):
            session.prefill(tokens, images)


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_of_other_families(make: Build, cuda: CudaRuntime, tmp_path: Path, family: str) -> None:
    tokens, images = [1, IMAGE, 2, 3, IMAGE, 4], [picture(64, 96), picture(128, 64, seed=1)]
    package = make(family, checkpoint=make_seeing_checkpoint(tmp_path, family), visual=True)
    with Engine.open(package, "tensorrt") as engine, Engine.open(package, threads=1) as reference:
        ours, theirs = engine.session(), reference.session()
        np.testing.assert_allclose(ours.prefill(tokens, images), theirs.prefill(tokens, images), atol=1e-4)
        np.testing.assert_allclose(ours.step([5]), theirs.step([5]), atol=1e-4)


@pytest.mark.parametrize("name", ["rg_default", "rg10_lookahead", "rg10_min_per_head", "rg10_mixed_chunks"])
def test_what_the_official_code_kept(name: str, tmp_path: Path, tensorrt: Path, cuda: CudaRuntime) -> None:
    """The others too, on a GPU: tests/gpu/test_gpu_tensorrt.py."""
    case = next(case for case in GOLDEN if case.name == name)
    build_case(case, tmp_path / "package", target=Target.TENSORRT)
    with Engine.open(tmp_path / "package", "tensorrt") as engine:
        assert replay_case(engine, case).passed


def test_a_session_goes_on_elsewhere(text: Path, cuda: CudaRuntime, tmp_path: Path) -> None:
    prompt, more = random_tokens(60), random_tokens(5, seed=1)
    with Engine.open(text, threads=1) as reference, reference.session() as session:
        session.prefill(prompt)
        session.save(tmp_path / "session")
        expected = [session.step([token]) for token in more]
    with Engine.open(text, "tensorrt") as engine, engine.restore(tmp_path / "session") as session:
        for token, wanted in zip(more, expected, strict=True):
            np.testing.assert_allclose(session.step([token]), wanted, atol=1e-5)
        session.save(tmp_path / "again")
    with Engine.open(text, threads=1) as reference, reference.restore(tmp_path / "again") as session:
        assert session.tokens_seen == 65


def test_a_decode_step_is_one_launch_and_one_wait(visual: Path, cuda: CudaRuntime) -> None:
    with Engine.open(visual, "tensorrt") as engine, engine.session() as session:
        session.prefill(random_tokens(20))
        session.step([1])  # the first one after the capture is checked
        for _ in range(3):
            cuda.stream.log.clear()
            session.step([2])
            assert cuda.stream.log == ["upload"] * 4 + ["launch", "download", "wait"]
        cuda.stream.log.clear()
        session.step([1, 2, 3])  # four inputs, and three that are empty
        assert cuda.stream.log == ["upload"] * 4 + ["execute", "download", "wait"]


def test_nothing_is_allocated_after_the_opening(visual: Path, cuda: CudaRuntime) -> None:
    with Engine.open(visual, "tensorrt", max_sessions=ROWS if NATIVE else 1) as engine:
        blocks, cuda.limit = dict(cuda.blocks), 0  # from now on each allocation fails
        contexts = engine.backend._captured[:]
        sessions = [engine.session() for _ in range(ROWS if NATIVE else 1)]
        for session in sessions:
            session.prefill([1, IMAGE, *random_tokens(30)], [picture(64, 96)])
        for token in random_tokens(10):
            engine.step_many([(session, [token]) for session in sessions])
            sessions[-1].step([token])
        sessions[0].kept()
        sessions[0].reset()
        assert cuda.blocks.keys() == blocks.keys()
        assert engine.backend._captured == contexts


def test_the_state_stays_where_it_is(text: Path, cuda: CudaRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, int]] = []
    run = fake_tensorrt.IExecutionContext._run

    def watched(context: Any, shapes: Any, addresses: dict[str, int]) -> None:
        seen.append(addresses)
        run(context, shapes, addresses)

    monkeypatch.setattr(fake_tensorrt.IExecutionContext, "_run", watched)
    with Engine.open(text, "tensorrt", max_sessions=ROWS if NATIVE else 1) as engine:
        session = engine.session()
        seen.clear()
        session.prefill(random_tokens(40))
        session.step([1])
        entries = {entry.name: entry for entry in engine.slab.entries}
        base = engine.memory.address("pool_key", 0) - entries["pool_key"].offset
        assert base in cuda.blocks
        assert len(seen) == 4
        for addresses in seen:
            for name, entry in entries.items():
                expected = base + entry.offset + session.row * entry.row_bytes
                assert addresses[f"past.{name}"] == addresses[f"present.{name}"] == expected
                assert entry.offset % 256 == 0


def test_everything_is_freed(text: Path, cuda: CudaRuntime) -> None:
    engine = Engine.open(text, "tensorrt")
    session = engine.session()
    session.prefill([1, 2, 3])
    assert cuda.blocks
    engine.close()
    del engine, session
    gc.collect()
    assert not cuda.blocks


@pytest.mark.parametrize("weights", ["stripped", "streamed"])
def test_weights_that_are_not_in_the_engine(
    make: Build, cuda: CudaRuntime, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    monkeypatch.setattr(fake_tensorrt, "REFITTED", [])
    package = make(weights, engine_weights=weights)
    with Engine.open(package, "tensorrt") as engine:
        budget = engine.backend._loaded.engine.weight_streaming_budget_v2
        if weights == "stripped":
            assert [str(package / "decoder.tensorrt.onnx")] == fake_tensorrt.REFITTED
            assert budget == -1
        else:
            assert fake_tensorrt.REFITTED == []
            assert budget == (1 << 20) - 1024  # what TensorRT offers, less what the contexts work in


class TestErrors:
    def test_a_package_without_an_engine(self, package: Path, cuda: CudaRuntime) -> None:
        with pytest.raises(EngineError, match=r"has no TensorRT engine of the decoder; build it .* --target tensorrt"):
            Engine.open(package, "tensorrt")

    def test_more_sessions_than_the_engine_takes(self, text: Path, cuda: CudaRuntime) -> None:
        with pytest.raises(OptionError, match=f"max_sessions must be at most {ROWS}.*got 4; build with --max-batch 4"):
            Engine.open(text, "tensorrt", max_sessions=4)

    def test_portable_bodies(self, text: Path, cuda: CudaRuntime) -> None:
        with pytest.raises(OptionError, match="native='off' is not for"):
            Engine.open(text, "tensorrt", native="off")

    def test_another_tensorrt(self, text: Path, cuda: CudaRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(runtime: Any, _: Any) -> None:
            runtime.logger.log(fake_tensorrt.ILogger.ERROR, "the version tag does not match")

        monkeypatch.setattr(fake_tensorrt.Runtime, "deserialize_cuda_engine", refuse)
        with pytest.raises(EngineError, match=r"TensorRT 10.3.0 cannot load decoder.engine: the version tag.*by 10"):
            Engine.open(text, "tensorrt")

    def test_no_memory(self, text: Path, cuda: CudaRuntime) -> None:
        cuda.limit = 1000
        with pytest.raises(EngineError, match=r"out of memory: the cache takes .* bytes, and 1,000 of 1,000"):
            Engine.open(text, "tensorrt")

    def test_a_step_that_fails(self, text: Path, cuda: CudaRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
        with Engine.open(text, "tensorrt") as engine, engine.session() as session:
            log = engine.backend._loaded.log

            def fail(*_: object) -> bool:
                log.log(fake_tensorrt.ILogger.ERROR, "PoolUpdate: past.counters is not at present.counters")
                return False

            monkeypatch.setattr(fake_tensorrt.IExecutionContext, "execute_async_v3", fail)
            with pytest.raises(EngineError, match=r"TensorRT refuses to run a step: PoolUpdate: past.counters"):
                session.prefill([1, 2])
            with pytest.raises(EngineError, match="call reset"):
                session.step([1])

    def test_no_cuda_bindings(self, text: Path, tensorrt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "cuda.bindings", None)
        with pytest.raises(MissingDependencyError, match=r"cuda-bindings.*trimkv-export\[tensorrt\].*JetPack 6.2"):
            Engine.open(text, "tensorrt")


@pytest.mark.usefixtures("cuda")
def test_the_plugin_is_the_installed_one(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's own is native code of whoever made it: loaded only where none is installed, and on request."""
    loaded = []
    monkeypatch.setattr(backend_module, "load_plugin", lambda _, library, __: loaded.append(library))
    Engine.open(text, "tensorrt").close()
    assert loaded == [tensorrt_library.FOLDER / tensorrt_library.PLUGIN]
    monkeypatch.setattr(tensorrt_library, "FOLDER", tmp_path)  # nothing is installed
    with pytest.raises(EngineError, match=r"none is installed here.*--trust-package-plugin"):
        Engine.open(text, "tensorrt")
    Engine.open(text, "tensorrt", trust_package_plugin=True).close()
    assert loaded[1:] == [text / tensorrt_library.PLUGIN]
    with pytest.raises(OptionError, match="trust_package_plugin must be True or False, got 1"):
        Engine.open(text, "tensorrt", trust_package_plugin=1)  # type: ignore[arg-type]
