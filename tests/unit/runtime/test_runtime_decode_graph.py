"""Decode steps as CUDA graphs, on a stand-in for ONNX Runtime with a GPU (capturing.py)."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from capturing import CapturingSession, capturing
from support import random_tokens

from trimkv_export.backends.native import find_library
from trimkv_export.errors import EngineError, OptionError
from trimkv_export.runtime import Engine

ROWS = 5
TOLERANCE = 2e-5  # a batch goes through other matrix kernels than a single row

native = pytest.mark.skipif(find_library() is None, reason="not built: make plugins")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> type[CapturingSession]:
    """See `capturing`."""
    return capturing(monkeypatch)


@pytest.fixture
def graphed(package: Path, cuda: type[CapturingSession]) -> Iterator[Engine]:
    with Engine.open(package, "cuda", max_sessions=ROWS, cuda_graph=True) as engine:
        yield engine


def test_only_on_the_cuda_provider(package: Path) -> None:
    said = "cuda_graph=True needs provider='cuda', got provider='cpu'; leave cuda_graph out, or open"
    with pytest.raises(OptionError, match=said):
        Engine.open(package, cuda_graph=True)
    with pytest.raises(OptionError, match="cuda_graph must be True or False, got 1"):
        Engine.open(package, "cuda", cuda_graph=1)  # type: ignore[arg-type]


@native
@pytest.mark.parametrize(
    "refusal",
    [
        "[ONNXRuntimeError] : 1 : FAIL : This session cannot use the graph capture feature as requested by the user as "
        "all compute graph nodes have not been partitioned to the CUDAExecutionProvider",
        "[ONNXRuntimeError] : 1 : FAIL : This session cannot use the CUDA Graph feature as requested by the user",
    ],
)
def test_a_graph_that_is_not_all_on_the_gpu(package: Path, cuda: type[CapturingSession], refusal: str) -> None:
    cuda.refusal = refusal
    with pytest.raises(EngineError, match=r"cannot be captured in a CUDA graph.*cannot use the.*without cuda_graph"):
        Engine.open(package, "cuda", cuda_graph=True)
    with pytest.raises(EngineError, match=r"ONNX Runtime cannot load decoder\.onnx"):
        Engine.open(package, "cuda")


@native
def test_a_provider_that_does_not_load(package: Path, cuda: type[CapturingSession]) -> None:
    cuda.loses_provider = True
    with pytest.raises(EngineError, match="fell back from CUDAExecutionProvider to CPUExecutionProvider; see that"):
        Engine.open(package, "cuda")


@native
def test_provider_options(package: Path, graphed: Engine) -> None:
    assert graphed.backend.providers == [("CUDAExecutionProvider", {"use_tf32": "0", "enable_cuda_graph": "1"})]
    with Engine.open(package, "cuda") as engine:
        assert engine.graphs is None
        assert engine.backend.providers == [("CUDAExecutionProvider", {"use_tf32": "0", "enable_cuda_graph": "0"})]


@native
def test_one_session_equals_one_without_graphs(package: Path, graphed: Engine) -> None:
    with Engine.open(package, native="require") as plain:
        sessions = [graphed.session(6), plain.session(6)]
        for part in (random_tokens(16), *([token] for token in random_tokens(30, 1)), random_tokens(9, 2), [3], [4]):
            with_graph, without = (session.step(part) for session in sessions)
            np.testing.assert_array_equal(with_graph, without)
            np.testing.assert_array_equal(sessions[0].kept(), sessions[1].kept())
        assert sessions[0].evictions == sessions[1].evictions > 3
    # One capture for all decode steps; prefill is never captured.
    assert graphed.backend.ids == ["-1", *["1"] * 31, "-1", "1", "1"]
    assert list(graphed.backend.captured) == ["1"]


@native
def test_rows_out_of_phase_equal_single_runs(package: Path, graphed: Engine) -> None:
    rng = np.random.default_rng(0)
    with Engine.open(package, native="require", max_sessions=ROWS) as plain:
        pairs = [(graphed.session(), plain.session()) for _ in range(ROWS)]
        for _ in range(50):
            lengths = np.where(
                rng.random(ROWS) < 0.3, 0, np.where(rng.random(ROWS) < 0.8, 1, rng.integers(2, 17, ROWS))
            )
            work = [(row, rng.integers(0, 256, length).tolist()) for row, length in enumerate(lengths) if length]
            found = graphed.step_many([(pairs[row][0], tokens) for row, tokens in work])
            for (row, tokens), logits in zip(work, found, strict=True):
                np.testing.assert_allclose(logits, pairs[row][1].step(tokens), atol=TOLERANCE)
            for ours, theirs in pairs:
                np.testing.assert_array_equal(ours.kept(), theirs.kept())
        assert min(ours.evictions for ours, _ in pairs) > 3
    # Single rows, and the first 2, 4 and 5 (all) rows.
    assert len(graphed.backend.captured) <= ROWS + 3


@native
def test_a_capture_that_fails_leaves_the_session_as_it_was(package: Path, graphed: Engine) -> None:
    session = graphed.session()
    session.step(random_tokens(12))
    before = session.kept()
    graphed.backend.fails = True
    with pytest.raises(EngineError, match=r"could not capture a decode step of 1 rows in a CUDA graph: operation not"):
        session.step([1])
    graphed.backend.fails = False
    np.testing.assert_array_equal(session.kept(), before)
    with Engine.open(package, native="require") as plain:
        other = plain.session()
        other.step(random_tokens(12))
        np.testing.assert_array_equal(session.step([1]), other.step([1]))


@native
def test_a_step_that_is_not_run_once_is_noticed(graphed: Engine) -> None:
    session = graphed.session()
    session.step(random_tokens(12))
    session._engine.graphs.of([0])  # type: ignore[union-attr]  # captured
    graphed.backend.captured.clear()  # so the next step is taken for a first one, and runs three times
    with pytest.raises(
        EngineError, match=r"left row 0 at 15 tokens, expected 13: .* open the package without cuda_graph"
    ):
        session.step([1])
    with pytest.raises(EngineError, match="failed midway"):
        session.step([1])


@native
def test_decoding_belongs_to_one_thread(graphed: Engine) -> None:
    session = graphed.session()
    errors: list[Exception] = []

    def elsewhere() -> None:
        session.step([1, 2])  # prefill is not captured
        try:
            session.step([3])
        except EngineError as error:
            errors.append(error)

    thread = threading.Thread(target=elsewhere, name="worker")
    thread.start()
    thread.join()
    assert "thread 'worker' cannot decode with this engine" in str(errors[0])
    assert session.step([3]).shape == (graphed.config.model.vocab_size,)
    assert session.tokens_seen == 3
