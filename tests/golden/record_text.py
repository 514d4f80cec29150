"""Record a case of text with a script that runs the official package, and leaves biases of projections at zero: these
get values.

record_text.py ORACLE_SCRIPT [arguments of its `case`]     # make_cases.sh runs this

Used of the script: `build(…) -> (model, class)`, and `main()`, whose command `case` writes base/, gates/, trace.npz and
case.json.
"""

import importlib.util
import sys
from typing import Any

import torch


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


if __name__ == "__main__":
    main()
