"""Several sessions in one step: the same as each alone, whatever the others do."""

from pathlib import Path

import numpy as np
import pytest
from support import KERNELS, NATIVE_MODE

from trimkv_export.errors import EngineError
from trimkv_export.runtime import Engine

ROWS = 8
TOLERANCE = 2e-5  # a batch goes through other matrix kernels than a single row


def plan(rng: np.random.Generator, vocabulary: int) -> list[list[list[int]]]:
    """Tokens of 60 steps for each row; [] leaves a row out. Rows are out of phase: prefill, decode, idle."""
    steps = []
    for _ in range(60):
        lengths = np.where(rng.random(ROWS) < 0.2, 0, np.where(rng.random(ROWS) < 0.75, 1, rng.integers(2, 17, ROWS)))
        steps.append([rng.integers(0, vocabulary, length).tolist() for length in lengths])
    return steps


@pytest.mark.parametrize("kernels", KERNELS)
def test_rows_out_of_phase_equal_single_runs(package: Path, kernels: str) -> None:
    native = NATIVE_MODE[kernels]
    with Engine.open(package, native=native, max_sessions=ROWS) as engine, Engine.open(package, native=native) as one:
        steps = plan(np.random.default_rng(0), engine.config.model.vocab_size)
        sessions = [engine.session() for _ in range(ROWS)]
        logits: list[list[np.ndarray]] = [[] for _ in range(ROWS)]
        kept: list[list[np.ndarray]] = [[] for _ in range(ROWS)]
        for step in steps:
            work = [(row, tokens) for row, tokens in enumerate(step) if tokens]
            found = engine.step_many([(sessions[row], tokens) for row, tokens in work])
            for (row, _), result in zip(work, found, strict=True):
                logits[row].append(result)
                kept[row].append(sessions[row].kept())
        for row in range(ROWS):
            with one.session() as alone:
                for index, tokens in enumerate(tokens for step in steps if (tokens := step[row])):
                    np.testing.assert_allclose(logits[row][index], alone.step(tokens), atol=TOLERANCE)
                    np.testing.assert_array_equal(kept[row][index], alone.kept())


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_row_that_ends_is_used_again_at_once(package: Path, kernels: str) -> None:
    with Engine.open(package, native=NATIVE_MODE[kernels], max_sessions=3) as engine:
        rng = np.random.default_rng(0)
        layers, heads = engine.config.model.num_layers, engine.config.model.num_kv_heads
        sessions = [engine.session() for _ in range(3)]
        for session in sessions:
            session.step(rng.integers(0, 100, 12).tolist())
        for turn in range(6):
            sessions[turn % 3].close()
            sessions[turn % 3] = fresh = engine.session()
            assert fresh.tokens_seen == 0
            engine.step_many([(session, [turn]) for session in sessions])
            assert fresh.kept().tolist() == [[layer, head, 0] for layer, head in np.ndindex(layers, heads)]


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_batch_that_fails_midway(package: Path, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def run_with_iobinding(self, binding: object) -> None:
            raise RuntimeError("no memory")

    with Engine.open(package, native=NATIVE_MODE[kernels], max_sessions=2) as engine:
        first, second = engine.session(), engine.session()
        backend = engine.backend
        monkeypatch.setattr(engine, "backend", Failing())
        if engine._batch is not None:
            monkeypatch.setattr(engine._batch, "_backend", Failing())
        with pytest.raises(EngineError, match="ONNX Runtime failed in a step of 1 tokens: no memory"):
            engine.step_many([(first, [1]), (second, [2])])
        monkeypatch.setattr(engine, "backend", backend)
        with pytest.raises(EngineError, match="failed midway"):
            first.step([1])
