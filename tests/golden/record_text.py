"""Record a case with a script that runs the official package, and leaves biases of projections at zero: these get
values. Of a model with a vision tower it records one image in the first step.

record_text.py ORACLE_SCRIPT [arguments of its `case`]     # make_cases.sh runs this

Used of the script: `build(…) -> (model, class)`, and `main()`, whose command `case` writes base/, gates/, trace.npz and
case.json. With an image the trace keeps the logits of each step's last token only. The official `forward` takes a
placeholder that the model itself has chosen for an image; choose a seed with which it chooses none.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

ORDINARY = 147  # ids below are ordinary tokens in the script's models


def main() -> None:
    path = sys.argv.pop(1)
    spec = importlib.util.spec_from_file_location("official_trimkv", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path}: no Python file")
    oracle: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(oracle)
    build = oracle.build

    def build_with_biases(*arguments: Any) -> tuple[torch.nn.Module, type]:
        model, plain = build(*arguments)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("_proj.bias"):
                    parameter.normal_(std=0.5, generator=generator)
        return model, plain

    oracle.build = build_with_biases
    sys.argv.insert(1, "case")
    oracle.main()
    _check_visual(Path(sys.argv[sys.argv.index("--out") + 1]) / "trace.npz")


def _check_visual(file: Path) -> None:
    with np.load(file) as archive:
        trace = dict(archive)
    if "pixel_values" not in trace:
        return
    if trace["decoded"].max() >= ORDINARY:
        raise SystemExit(f"{file}: the model chose the placeholder {trace['decoded'].max()}; take another --seed")
    kept = {name: values[-1:] if name.endswith("_logits") else values for name, values in trace.items()}
    np.savez_compressed(file, allow_pickle=False, **kept)


if __name__ == "__main__":
    main()
