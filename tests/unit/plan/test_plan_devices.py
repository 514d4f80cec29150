import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from trimkv_export.errors import OptionError
from trimkv_export.files import read_yaml
from trimkv_export.plan import device, devices
from trimkv_export.plan.devices import load_devices

WANTED = {
    "orin-nano-4gb", "orin-nano-8gb", "orin-nx-8gb", "orin-nx-16gb", "agx-orin-32gb", "agx-orin-64gb", "thor-t4000",
    "thor-t5000", "l4", "a10", "l40s", "a100-40gb", "a100-80gb", "a100-80gb-pcie", "h100", "h100-pcie", "h200", "b200",
    "rtx-4090", "rtx-5090", "rtx-pro-6000", "rtx-pro-6000-server", "cpu",
}  # fmt: skip

GOOD = """
sources: {compute_capability: a list, precisions: a matrix}
devices:
  - name: board
    aliases: [card]
    title: A board
    kind: gpu
    memory: 8 GiB
    bandwidth: 102.4 GB/s
    compute_capability: "8.7"
    precisions: [fp32, int8]
    unified_memory: false
    software: [{cuda: "12.6", tensorrt: "10.3"}]
    reserve: 500 MB
    sources: {memory: a sheet, bandwidth: a sheet, software: notes, reserve: "estimate: a guess"}
"""


def _file(folder: Path, text: str) -> Path:
    file = folder / "devices.yaml"
    file.write_text(text)
    return file


def test_every_device_that_is_promised() -> None:
    assert {profile.name for profile in devices()} == WANTED
    json.dumps([asdict(profile) for profile in devices()])


@pytest.mark.parametrize("name", sorted(WANTED - {"cpu"}))
def test_figures_are_plausible(name: str) -> None:
    profile = device(name)
    assert profile.memory_bytes is not None
    assert profile.bandwidth is not None
    sheet = re.search(r"(\d+) GB", profile.title)
    assert sheet is not None
    # Drivers and kernels report a little less than binary gigabytes.
    assert 0.8 * 2**30 < profile.memory_bytes / int(sheet[1]) <= 2**30
    assert 30e9 < profile.bandwidth < 1e13
    assert profile.reserve(desktop=True) < 0.7 * profile.memory_bytes
    assert profile.compute_capability is not None
    major, minor = map(int, profile.compute_capability.split("."))
    assert ("fp8" in profile.precisions) == ((major, minor) >= (8, 9))
    assert ("fp4" in profile.precisions) == (major >= 10)
    assert {"fp32", "fp16", "int4"} <= set(profile.precisions)
    assert profile.unified_memory == (profile.kind == "jetson")
    assert all((versions.jetpack is not None) == (profile.kind == "jetson") for versions in profile.software)
    assert profile.software
    # What a system takes is never on a sheet.
    assert "reserve" in profile.estimates
    assert set(profile.estimates) <= {"reserve", "desktop", "memory", "software"}


def test_cpu_is_asked_at_run_time() -> None:
    cpu = device("cpu")
    assert (cpu.memory_bytes, cpu.bandwidth, cpu.compute_capability) == (None, None, None)
    assert cpu.reserve(desktop=True) == 0
    assert cpu.precisions == ("fp32", "fp16", "int8", "int4")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("orin-nano-8gb", "orin-nano-8gb"),
        ("jetson-orin-nano", "orin-nano-8gb"),
        (" Orin Nano 8GB ", "orin-nano-8gb"),
        ("JETSON_AGX_ORIN", "agx-orin-64gb"),
        ("H100", "h100"),
        ("thor", "thor-t5000"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
    ],
)
def test_names_and_aliases(name: str, found: str) -> None:
    assert device(name).name == found


def test_desktop_takes_more() -> None:
    board = device("orin-nano-8gb")
    assert board.reserve(desktop=True) - board.reserve() == board.desktop_bytes > 0


@pytest.mark.parametrize("name", ["orin-nano-16gb", "h10O", "", "x" * 5000])
def test_unknown_device(name: str) -> None:
    with pytest.raises(OptionError, match="there is no device") as error:
        device(name)
    assert len(str(error.value)) < 700
    assert all(profile.name in str(error.value) for profile in devices())
    assert ("did you mean 'orin-nano-8gb'" in str(error.value)) == (name == "orin-nano-16gb")
    assert ("'h100'" in str(error.value)) == (name == "h10O")


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    (board,) = load_devices(_file(tmp_path, GOOD))
    assert board.memory_bytes == 8 << 30
    assert board.bandwidth == 102_400_000_000
    assert board.reserve_bytes == 500_000_000
    assert board.estimates == ("reserve",)
    assert board.sources["precisions"] == "a matrix"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("    kind: gpu\n", "", "lacks 'kind'"),
        ("kind: gpu", "kind: tpu", "'kind' must be one of jetson, gpu, cpu, got 'tpu'"),
        ("kind: gpu", "kind: jetson", "names a jetpack on a jetson"),
        ("kind: gpu", "kind: cpu", "'compute_capability' must be null on a cpu"),
        ("bandwidth: 102", "bandwith: 102", "'bandwith' is not known; did you mean 'bandwidth'"),
        ("102.4 GB/s", "102.4 GB", "'bandwidth' must be .* '102.4 GB/s', got '102.4 GB'"),
        ("102.4 GB/s", "0 GB/s", "'bandwidth' must be above 0"),
        ("102.4 GB/s", "null", "may be null on a cpu only"),
        ("8 GiB", "8", "'memory' must be .*, got 8"),
        ("8 GiB", "8 gb", "'memory' must be .*, got '8 gb'"),
        ("8 GiB", "1.5 B", "'memory' must be whole bytes .*, got '1.5 B'"),
        ("8 GiB", "-8 GiB", "'memory' must be"),
        ("8 GiB", "1 MB", "leave nothing of 'memory'"),
        ("8 GiB", "{a: b}", "'memory' must be"),
        ('"8.7"', "8.7", "must be a version in quotes, such as \"12.6\", got 8.7"),
        ('"12.6"', "12.6", "'software.cuda' must be a version in quotes"),
        ('cuda: "12.6", ', "", "'software' lacks 'cuda'"),
        ("[fp32, int8]", "[fp32, fp12]", "'precisions' must be one of .*, got 'fp12'"),
        ("[fp32, int8]", "[fp32, fp32]", "without repetition"),
        ("[fp32, int8]", "[]", "without repetition"),
        ("unified_memory: false", "unified_memory: 0", "must be true or false, got 0"),
        ("name: board", "name: Big Board", "small letters and digits"),
        ("name: board", "name: [board]", "small letters and digits"),
        ("title: A board", "title: ''", "'title' must be a text"),
        ("aliases: [card]", "aliases: card", "'aliases' must be a list"),
        ("aliases: [card]", "aliases: [board]", "the name 'board' is taken by 'board'"),
        (", reserve: \"estimate: a guess\"", "", "'sources' has nothing for 'reserve'"),
        (", software: notes", "", "'sources' has nothing for 'software'"),
        (", software: notes", ", software: notes, desktop: mine", "about 'desktop', which this device has not"),
        (", software: notes", ", software: 7", "'sources.software' must be a text, got 7"),
        (", software: notes", ", weight: notes", "'sources' is about memory, .*, got 'weight'"),
        ("    kind: gpu\n", "    kind: gpu\n    kind: cpu\n", "line 8: .* the key 'kind' is there twice"),
        ("aliases: [card]", "aliases: [card", "line 6: .* expected"),
        ("aliases: [card]", "aliases: !!python/object:os.system [card]", "could not determine a constructor"),
        ("title: A board", "title: 2026-13-45", "is not the YAML expected here"),
    ],
)  # fmt: skip
def test_a_broken_file_says_where_and_what(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in GOOD
    file = _file(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(OptionError, match=says) as error:
        load_devices(file)
    assert str(error.value).startswith(str(file))
    assert "line" in str(error.value) or "device 1" in str(error.value) or "YAML" in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must be keys and values, got None"),
        ("- a\n", "must be keys and values"),
        ("devices: []\n", "'devices' must be a list of devices, got \\[\\]"),
        ("devices: {}\n", "'devices' must be a list of devices"),
        ("devices: [7]\n", "device 1: must be keys and values, got 7"),
        ("devices: [{}]\nsources: [1]\n", "'sources' must be figures"),
        ("a: 1\n", "the key 'a' is not known"),
        ("? [a]\n: 1\n", "is not the YAML expected here"),
        ("\x00", "is not the YAML expected here"),
    ],
)
def test_a_file_without_devices(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        load_devices(_file(tmp_path, text))


def test_two_devices_of_one_name(tmp_path: Path) -> None:
    _, _, device_text = GOOD.partition("devices:\n")
    with pytest.raises(OptionError, match=r"device 2 \('board'\): the name 'board' is taken by 'board'"):
        load_devices(_file(tmp_path, GOOD + device_text))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be read"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(OptionError, match="cannot be read"):
        read_yaml(tmp_path)


def test_yaml_is_imported_only_when_devices_are_read() -> None:
    code = "import sys, trimkv_export.plan; print('yaml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
