import os
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from support import KERNELS, NATIVE_MODE, build, random_tokens

from trimkv_export.config import EvictionConfig, Policy
from trimkv_export.errors import OptionError, OutputError
from trimkv_export.evaluation import EvaluatedPolicy, open_variant
from trimkv_export.evaluation.variants import variant_eviction
from trimkv_export.graph.check import check_graph
from trimkv_export.package import Package
from trimkv_export.runtime import Engine
from trimkv_export.verify import check_engine

# The package keeps 8 and evicts every 4: after 100 tokens one by one the last eviction was just now.
TOKENS = random_tokens(100)
Kept = dict[tuple[int, int], list[int]]


def run(folder: Path, native: str, budget: int | None = None) -> tuple[np.ndarray, Kept]:
    """Logits after each of the tokens, and the positions that each stream keeps."""
    with Engine.open(folder, native=native, threads=1) as engine, engine.session(budget) as session:
        logits = np.stack([session.step([token]) for token in TOKENS])
        kept: Kept = {}
        for layer, head, position in session.kept().tolist():
            kept.setdefault((layer, head), []).append(position)
        return logits, kept


@pytest.fixture(params=KERNELS)
def native(request: pytest.FixtureRequest) -> str:
    mode: str = NATIVE_MODE[request.param]
    return mode


@pytest.fixture(scope="module")
def opened(package: Path) -> Package:
    return Package.open(package)


def test_the_package_itself_where_it_is_as_asked(opened: Package) -> None:
    for policy, budget in ((EvaluatedPolicy.GLOBAL, 8), (EvaluatedPolicy.GLOBAL, 3), (EvaluatedPolicy.FULL, 8)):
        with open_variant(opened, policy, budget, 100) as folder:
            assert folder == opened.path


def test_a_larger_budget_is_that_of_a_package_built_for_it(
    opened: Package, checkpoint: Path, tmp_path: Path, native: str
) -> None:
    larger = build(checkpoint, tmp_path / "larger", budget=20).path
    with open_variant(opened, EvaluatedPolicy.GLOBAL, 20, 100) as folder:
        found, kept = run(folder, native)
        smaller, smaller_kept = run(folder, native, 8)
    expected, expected_kept = run(larger, native)
    np.testing.assert_array_equal(found, expected)
    assert kept == expected_kept
    expected, expected_kept = run(opened.path, native)
    np.testing.assert_allclose(smaller, expected, atol=1e-4)
    assert smaller_kept == expected_kept


def test_full_never_evicts(opened: Package, native: str) -> None:
    with open_variant(opened, EvaluatedPolicy.FULL, 100, 100) as folder:
        logits, kept = run(folder, native)
    assert list(kept.values()) == [list(range(100))] * 6
    with Engine.open(opened.path, native=native, threads=1) as engine, engine.session() as session:
        np.testing.assert_allclose(logits[10], [session.step([token]) for token in TOKENS[:11]][-1], atol=1e-4)


def test_recent_keeps_the_last(opened: Package, native: str) -> None:
    with open_variant(opened, EvaluatedPolicy.RECENT, 8, 100) as folder:
        _, kept = run(folder, native)
        _, fewer = run(folder, native, 4)
    assert list(kept.values()) == [list(range(92, 100))] * 6
    assert list(fewer.values()) == [list(range(96, 100))] * 6


def test_sinks_stay(opened: Package, native: str) -> None:
    with open_variant(opened, EvaluatedPolicy.SINKS_RECENT, 8, 100) as folder:
        _, kept = run(folder, native)
    assert list(kept.values()) == [[0, 1, 2, 3, 96, 97, 98, 99]] * 6


def test_random_depends_on_the_seed(opened: Package, native: str) -> None:
    found = []
    for seed in (0, 0, 1):
        with open_variant(opened, EvaluatedPolicy.RANDOM, 8, 100, seed) as folder:
            found.append(run(folder, native)[1])
    assert found[0] == found[1] != found[2]
    assert set(map(len, found[0].values())) == {8}
    assert len(set(map(tuple, found[0].values()))) == 6
    halves = Counter(position < 50 for kept in (found[0], found[2]) for stream in kept.values() for position in stream)
    assert 30 < halves[True] < 66  # of 96


@pytest.mark.parametrize("gate", ["rg10", "rg"])
def test_both_policies_of_the_gates_are_those_of_the_specification(
    checkpoint: Path, tmp_path: Path, gate: str, native: str
) -> None:
    other = Policy.PER_HEAD if gate == "rg10" else Policy.GLOBAL
    package = Package.open(
        build(checkpoint, tmp_path / "package", policy=Policy.PER_HEAD if gate == "rg" else None).path
    )
    assert package.config.eviction.policy is not other
    with (
        open_variant(package, EvaluatedPolicy(other), 8, 100) as folder,
        Engine.open(folder, native=native, threads=1) as engine,
    ):
        assert engine.config.eviction.policy is other
        assert check_engine(engine).passed


@pytest.mark.parametrize("policy", EvaluatedPolicy)
def test_a_variant_is_a_valid_package(opened: Package, policy: EvaluatedPolicy) -> None:
    with open_variant(opened, policy, 20, 100) as folder:
        config = Package.open(folder).config
        assert config.eviction.evict_every == 4
        assert config.cache.budget == 20
        check_graph(onnx.load(str(folder / "decoder.onnx"), load_external_data=False))
        assert folder.parent == opened.path.parent
        assert (folder / "decoder.onnx.data").samefile(opened.path / "decoder.onnx.data")
    assert not folder.exists()


def test_text_for_a_model_that_sees(visual_package: Path, native: str) -> None:
    with (
        open_variant(Package.open(visual_package), EvaluatedPolicy.SINKS_RECENT, 8, 100) as folder,
        Engine.open(folder, native=native, vision=False, threads=1) as engine,
        engine.session() as session,
    ):
        session.prefill(TOKENS)
        assert sorted(set(session.kept()[:, 2].tolist())) == [0, 1, 2, 3, 96, 97, 98, 99]


def test_where_links_cannot_be(opened: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    with open_variant(opened, EvaluatedPolicy.RECENT, 8, 100) as folder:
        assert Package.open(folder).config.eviction.policy is Policy.PER_HEAD


def test_a_folder_that_cannot_be_written(opened: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr("shutil.copyfile", full)
    with (
        pytest.raises(OutputError, match="with the policy recent: No space left on device"),
        open_variant(opened, EvaluatedPolicy.RECENT, 8, 100),
    ):
        pass
    assert not list(opened.path.parent.glob(".*.eval-*"))


def test_what_a_policy_has_no_use_for() -> None:
    eviction = EvictionConfig(Policy.GLOBAL, 8, 4, min_tokens_per_head=2, lookahead_steps=3)
    found = {policy: variant_eviction(eviction, policy, 16) for policy in EvaluatedPolicy}
    assert found[EvaluatedPolicy.GLOBAL] == EvictionConfig(Policy.GLOBAL, 16, 4, 2, 3)
    assert found[EvaluatedPolicy.PER_HEAD] == EvictionConfig(Policy.PER_HEAD, 16, 4, 0, 3)
    assert found[EvaluatedPolicy.RECENT] == EvictionConfig(Policy.PER_HEAD, 16, 4)
    with pytest.raises(OptionError, match="min-tokens-per-head must not exceed the budget: got 2 with a budget of 1"):
        variant_eviction(eviction, EvaluatedPolicy.GLOBAL, 1)
