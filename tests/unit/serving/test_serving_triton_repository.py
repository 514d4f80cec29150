"""The model repository: what is in it, that it stands alone, and what is refused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, Cli, build, copy_package, seal

from trimkv_export.errors import OptionError, OutputError, PackageError
from trimkv_export.runtime import Engine
from trimkv_export.serving import ServingOptions
from trimkv_export.serving.triton.repository import config_pbtxt, write_repository

STAND_IN = Path(__file__).with_name("triton_stand_in.py")


def test_the_model_runs_out_of_its_own_folder(package: Path, tmp_path: Path) -> None:
    report = write_repository(package, tmp_path / "repository", ServingOptions(max_sequences=2), name="m")
    assert (report.path, report.model) == (tmp_path / "repository" / "m", "m")
    version = report.path / "1"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(STAND_IN), str(version), json.dumps(ServingOptions(max_sequences=2).parameters())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    with Engine.open(package) as engine, engine.session() as session:
        expected = engine.tokenizer.decode(list(session.generate(engine.tokenizer.encode("hello"), 9)))
    assert found["answer"] == {"text_output": expected, "finish_reason": "length"}
    assert "max_tokens must be" in found["error"]
    assert found["code"] == 0
    assert found["loaded"] == []
    assert Path(found["where"]).is_relative_to(version)


def test_files_of_the_package_are_linked_and_others_left_out(package: Path, tmp_path: Path) -> None:
    report = write_repository(package, tmp_path, ServingOptions())
    assert report.model == package.name
    version = report.path / "1"
    assert (version / "package" / "decoder.onnx").samefile(package / "decoder.onnx")
    assert {path.name for path in (version / "package").iterdir()} == {path.name for path in package.iterdir()}
    assert not (version / "trimkv_export" / "cli").exists()
    assert not [*version.rglob("__pycache__")]
    config = (report.path / "config.pbtxt").read_text()
    assert 'parameters { key: "max_sequences" value { string_value: "16" } }' in config
    assert "KIND_CPU" in config


def test_gpu_and_environment(package: Path, tmp_path: Path) -> None:
    options = ServingOptions(provider="cuda")
    config = (
        write_repository(package, tmp_path, options, name="m", environment=Path("/opt/model")).path / "config.pbtxt"
    ).read_text()
    assert "KIND_GPU" in config
    assert 'key: "EXECUTION_ENV_PATH" value { string_value: "/opt/model" }' in config


def test_quotes_in_parameters_are_escaped() -> None:
    text = config_pbtxt("m", "cpu", {"a": 'say "x"\\\n'})
    assert r'string_value: "say \042x\042\134\012"' in text


def test_an_existing_model_stays_unless_it_may_be_replaced(package: Path, tmp_path: Path) -> None:
    write_repository(package, tmp_path, ServingOptions(), name="m")
    with pytest.raises(OutputError, match="exists already"):
        write_repository(package, tmp_path, ServingOptions(top_k=3), name="m")
    report = write_repository(package, tmp_path, ServingOptions(top_k=3), name="m", overwrite=True)
    assert 'key: "top_k" value { string_value: "3" }' in (report.path / "config.pbtxt").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b", "x" * 101])
def test_bad_names(package: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(OptionError, match="name must be"):
        write_repository(package, tmp_path, ServingOptions(), name=name)


def test_options_that_are_not_for_this_package(package: Path, tmp_path: Path) -> None:
    """With which the server could not load it."""
    for changes, said in (
        ({"budget": 9}, "budget must be a whole number from 1 to 8, what the package was built for, got 9"),
        ({"prefill_chunk": 17}, "prefill_chunk must be a whole number from 0 to 16, what the package was built for"),
        ({"provider": "tensorrt"}, "has no TensorRT engine of the decoder; build it with --target tensorrt"),
    ):
        options = ServingOptions(**changes)
        with pytest.raises(OptionError, match=said):
            write_repository(package, tmp_path / "repository", options)
    with pytest.raises(PackageError):
        write_repository(tmp_path, tmp_path / "repository", ServingOptions())
    assert [*tmp_path.iterdir()] == []


def test_no_more_sequences_than_fit_the_device_of_the_build(checkpoint: Path, tmp_path: Path) -> None:
    package = build(checkpoint, tmp_path / "package", device="l4").path
    (tmp_path / "repository").mkdir()
    write_repository(package, tmp_path / "repository", ServingOptions(max_sequences=100))
    with pytest.raises(OptionError, match=r"max_sequences must be at most [0-9]+, what fits l4"):
        write_repository(package, tmp_path / "repository", ServingOptions(max_sequences=10_000_000), name="other")


def test_a_package_that_needs_more(checkpoint: Path, tmp_path: Path) -> None:
    package = build(checkpoint, tmp_path / "package", precision="bf16", min_tokens_per_head=2).path
    with pytest.raises(OptionError, match="provider cpu: ONNX Runtime has no bfloat16 there"):
        write_repository(package, tmp_path / "repository", ServingOptions())
    with pytest.raises(OptionError, match="budget must be a whole number from 2 to 8"):
        write_repository(package, tmp_path / "repository", ServingOptions(budget=1))


@pytest.mark.parametrize("content", ["{}x", '{"device_plan": 5}', '{"device_plan": {"max_sequences": 1}}'])
def test_a_plan_by_a_stranger(cli: Cli, package: Path, tmp_path: Path, content: str) -> None:
    changed = copy_package(package, tmp_path / "package")
    (changed / "memory_plan.json").write_text(content)
    seal(changed)
    done = cli("triton", changed, "--output", tmp_path / "repository")
    assert (done.code, done.err.count("\n")) == (PackageError.exit_code, 1)
    assert "memory_plan.json: " in done.err


def test_the_container_has_shared_memory_for_the_largest_request() -> None:
    found = re.search(r"shm_size: (\d+)g", (ROOT / "docker" / "triton" / "compose.yaml").read_text())
    assert found is not None
    options = ServingOptions()
    largest = options.max_images * options.max_image_bytes * 4 / 3 + options.max_prompt_bytes  # as base64
    assert int(found[1]) << 30 > 1.2 * largest


def test_command(cli: Cli, package: Path, tmp_path: Path) -> None:
    done = cli("triton", package, "--output", tmp_path, "--name", "m", "--max-sequences", "3", "--json")
    assert done.code == 0
    report = json.loads(done.out)
    assert report["model"] == "m"
    with Engine.open(package, max_sessions=3) as engine:
        assert report["cache_bytes"] == engine.cache_bytes
    assert cli("triton", package, "--output", tmp_path, "--name", "m").code == OutputError.exit_code
    done = cli("triton", package, "--output", tmp_path, "--name", "m", "--overwrite")
    assert "--model-repository" in done.out
    assert cli("triton", package, "--output", tmp_path, "--max-sequences", "0").code == OptionError.exit_code
    assert cli("triton", package).code == 2
