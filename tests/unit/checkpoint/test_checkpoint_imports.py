"""The checkpoint layer imports no framework, and nothing of the project but errors and element types."""

import subprocess
import sys

SCRIPT = """
import sys
import trimkv_export.checkpoint
banned = {"torch", "onnx", "transformers", "safetensors", "ml_dtypes", "huggingface_hub", "pickle"}
print(sorted(banned & set(sys.modules)))
ours = {name for name in sys.modules if name.startswith("trimkv_export.")}
print(sorted(name for name in ours if not name.startswith("trimkv_export.checkpoint")))
"""


def test_import_is_light() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    loaded, ours = done.stdout.splitlines()
    assert set(loaded.strip("[]").replace("'", "").split(", ")) <= {"", "pickle"}  # NumPy itself imports pickle
    assert ours == "['trimkv_export.dtypes', 'trimkv_export.errors']"
