"""Building takes little memory, whatever the size of the model."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support import make_checkpoint

from trimkv_export.models import decoder_spec

MEGABYTE = 10**6
# VmHWM and not ru_maxrss, which a child inherits from the process that starts it.
BUILD = """
import sys
from pathlib import Path
from trimkv_export.config import BuildOptions, Precision
from trimkv_export.build.builder import build_package
base, gates, output, precision = sys.argv[1:]
report = build_package(BuildOptions(base, 64, gates=gates, output=Path(output), precision=Precision(precision)))
print(report.config.weight_bytes)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def grow(base: Path) -> int:
    """Replace the small model's weights by 300 MB of random bfloat16; returns their bytes."""
    config = json.loads((base / "config.json").read_text())
    config |= {"intermediate_size": 150_000, "vocab_size": 1_000_000}
    (base / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in decoder_spec(config, base).tensors().items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # Sign and mantissa are random, the exponent is that of small numbers: float16 can hold them all.
    block = np.random.default_rng(0).integers(0, 1 << 16, 1 << 20, np.uint16) & 0x80FF | 0x3C00
    data = block.astype(np.uint16).tobytes()
    with (base / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, len(data)):
            file.write(data[: end - start])
    return end


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    out = make_checkpoint(tmp_path_factory.mktemp("large"), hidden=96)
    yield out, grow(out / "base")
    shutil.rmtree(out)  # pytest keeps the folders of the last runs


@pytest.mark.parametrize(("precision", "share"), [("bf16", 1), ("fp32", 2)])
def test_peak_memory_of_a_build(large: tuple[Path, int], tmp_path: Path, precision: str, share: int) -> None:
    checkpoint, nbytes = large
    assert nbytes > 300 * MEGABYTE
    arguments = [str(checkpoint / "base"), str(checkpoint / "gates"), str(tmp_path / "package"), precision]
    done = subprocess.run([sys.executable, "-c", BUILD, *arguments], capture_output=True, text=True, check=True)
    weight_bytes, peak = done.stdout.split()
    assert int(weight_bytes) > share * nbytes
    assert int(peak) * 1024 < 250 * MEGABYTE
    shutil.rmtree(tmp_path / "package")
