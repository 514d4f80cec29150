import json
import re
import subprocess
import sys
from dataclasses import asdict

import pytest

from trimkv_export.errors import OptionError
from trimkv_export.files import read_yaml
from trimkv_export.plan import device, devices
from trimkv_export.plan.devices import SHIPPED

WANTED = {
    "orin-nano-4gb", "orin-nano-8gb", "orin-nx-8gb", "orin-nx-16gb", "agx-orin-32gb", "agx-orin-64gb", "thor-t4000",
    "thor-t5000", "l4", "a10", "l40s", "a100-40gb", "a100-80gb", "a100-80gb-pcie", "h100", "h100-pcie", "h200", "b200",
    "rtx-4090", "rtx-5090", "rtx-pro-6000", "rtx-pro-6000-server", "cpu",
}  # fmt: skip

PRECISIONS = ["fp32", "fp16", "bf16", "int8", "int4", "fp8", "fp4"]
FIGURES = {"memory", "bandwidth", "compute_capability", "precisions", "reserve"}


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
    assert profile.reserve_bytes < 0.45 * profile.memory_bytes
    assert profile.compute_capability is not None
    major, minor = map(int, profile.compute_capability.split("."))
    assert ("fp8" in profile.precisions) == ((major, minor) >= (8, 9))
    assert ("fp4" in profile.precisions) == (major >= 10)
    assert {"fp32", "fp16", "int4"} <= set(profile.precisions)
    assert profile.unified_memory == (profile.kind == "jetson")


def test_cpu_is_asked_at_run_time() -> None:
    cpu = device("cpu")
    assert (cpu.memory_bytes, cpu.bandwidth, cpu.compute_capability) == (None, None, None)
    assert cpu.reserve_bytes == 0
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


@pytest.mark.parametrize("name", ["orin-nano-16gb", "h10O", "", "x" * 5000])
def test_unknown_device(name: str) -> None:
    with pytest.raises(OptionError, match="there is no device") as error:
        device(name)
    assert len(str(error.value)) < 700
    assert all(profile.name in str(error.value) for profile in devices())
    assert ("did you mean 'orin-nano-8gb'" in str(error.value)) == (name == "orin-nano-16gb")
    assert ("'h100'" in str(error.value)) == (name == "h10O")


def test_the_shipped_file_in_full() -> None:
    """Every key is known and of its type, every figure has a source, and no name is there twice (read_yaml: no key)."""
    content = read_yaml(SHIPPED)
    assert set(content) == {"sources", "devices"}
    common = content["sources"]
    names: list[str] = []
    for values, profile in zip(content["devices"], devices(), strict=True):
        required = {"name", "title", "kind", "unified_memory", "sources", *FIGURES}
        assert required <= set(values) <= required | {"aliases"}
        assert (profile.name, profile.aliases) == (values["name"], tuple(values.get("aliases", ())))
        names += [profile.name, *profile.aliases]
        assert values["title"].strip() == values["title"] != ""
        assert values["kind"] in ("jetson", "gpu", "cpu")
        assert isinstance(values["unified_memory"], bool)
        assert values["precisions"] == [known for known in PRECISIONS if known in values["precisions"]] != []
        unknown = {"memory", "bandwidth", "compute_capability"} if profile.kind == "cpu" else set()
        known = {key for key in FIGURES if values[key] is not None}
        assert known == FIGURES - unknown
        assert known <= set(values["sources"]) | set(common)
        assert set(values["sources"]) <= known
        assert all(isinstance(source, str) and source.strip() for source in {**common, **values["sources"]}.values())
        if profile.kind == "cpu":
            continue
        for text, nbytes in ((values["memory"], profile.memory_bytes), (values["reserve"], profile.reserve_bytes)):
            assert re.fullmatch(r"\d+ (B|MB|MiB|GB)", text)
            assert nbytes
        assert re.fullmatch(r"\d+(\.\d+)? GB/s", values["bandwidth"])
        assert re.fullmatch(r"\d+\.\d", values["compute_capability"])
        # What a system takes is never on a sheet; bandwidth, kernels and their number formats always are.
        assert values["sources"]["reserve"].startswith("estimate: ")
        assert not any("estimate" in values["sources"].get(key, "") for key in FIGURES - {"reserve", "memory"})
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) for name in names)


def test_sizes_in_bytes() -> None:
    """Decimal and binary units, exactly."""
    board = device("orin-nano-4gb")
    assert (board.memory_bytes, board.bandwidth, board.reserve_bytes) == (3375 << 20, 51_200_000_000, 1_400_000_000)


def test_yaml_is_imported_only_when_devices_are_read() -> None:
    code = "import sys, trimkv_export.plan; print('yaml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
