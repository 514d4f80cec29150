import json
from pathlib import Path

import pytest
from support import Cli, build, make_checkpoint, random_tokens

from trimkv_export.errors import OptionError
from trimkv_export.runtime import Engine
from trimkv_export.verify import compare_engines


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("wide"), hidden=64, intermediate=96)


@pytest.fixture(scope="module")
def fine(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("fine") / "package"
    build(wide, output)
    return output


@pytest.fixture(scope="module")
def coarse(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("coarse") / "package"
    build(wide, output, precision="int4")
    return output


def test_a_package_agrees_with_itself(package: Path) -> None:
    with Engine.open(package) as engine, Engine.open(package) as other:
        found = compare_engines(engine, other, random_tokens(100), 9)
    assert (found.prompt_tokens, found.new_tokens) == (100, 9)
    assert (found.logit_difference, found.max_logit_difference) == (0, 0)
    assert (found.token_agreement, found.kept_overlap) == (1, 1)


def test_int4_differs_a_little(fine: Path, coarse: Path) -> None:
    with Engine.open(coarse) as engine, Engine.open(fine) as other:
        found = compare_engines(engine, other, random_tokens(100), 20)
    assert 0 < found.logit_difference < 1  # the weights are random: nothing in them is redundant
    assert 0 < found.token_agreement <= 1
    assert 0.5 < found.kept_overlap < 1


def test_other_models_and_nothing_to_compare(package: Path, tmp_path: Path) -> None:
    build(make_checkpoint(tmp_path / "other", layers=1), tmp_path / "package")
    with Engine.open(package) as engine, Engine.open(tmp_path / "package") as other:
        with pytest.raises(OptionError, match=r"are of different models: num_layers \d and 1"):
            compare_engines(engine, other, [1, 2])
        with pytest.raises(OptionError, match="nothing to compare in 0 tokens"):
            compare_engines(engine, engine, [])


def test_the_command(cli: Cli, fine: Path, coarse: Path, tmp_path: Path) -> None:
    done = cli("verify", coarse, "--against", fine, "--json")
    assert done.code == 0
    assert json.loads(done.out)["against"]["package"] == str(fine)
    (tmp_path / "text").write_text("What does the cache keep? " * 5)
    done = cli("verify", coarse, "--against", fine, "--text", tmp_path / "text")
    assert done.code == 0
    assert "kept overlap" in done.out
    done = cli("verify", fine, "--text", tmp_path / "text")
    assert (done.code, done.err) == (2, f"error: --text {tmp_path / 'text'} goes with --against\n")
