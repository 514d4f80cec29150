"""Are the sizes that a package states right? Each is computed again, from the checkpoint and from the graphs.

    python benchmarks/package_figures.py PACKAGE --checkpoint DIR

DIR holds base/ and gates/, from which PACKAGE was built; both as safetensors, as random_checkpoint.py writes them.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from common import Check, describe_machine, header, print_checks, write_json

__all__ = ["package_checks"]

ITEM = {"fp32": 4, "fp16": 2, "bf16": 2}
ONNX_ITEM = {onnx.TensorProto.FLOAT: 4, onnx.TensorProto.FLOAT16: 2, onnx.TensorProto.BFLOAT16: 2}
SHARED_GATE = "linear3.weight"


def package_checks(package: Path, checkpoint: Path) -> list[Check]:
    """One check for each figure of config.json and memory_plan.json; the value is how far it is off."""
    config, plan = (json.loads((package / name).read_text()) for name in ("config.json", "memory_plan.json"))
    weights = {file.name: placed_weights(package, file) for file in sorted(package.glob("*.onnx"))}
    placed = sum(map(sum, weights.values()))
    item = ITEM[config["precision"]]
    needed = needed_bytes(checkpoint, item)
    out = [
        off("weight_bytes, against the tensors placed", config["weight_bytes"], placed),
        off("weight_bytes, against the checkpoint's", config["weight_bytes"], needed),
        off("weight_bytes of the plan", plan["weight_bytes"], placed),
    ]
    if vision := config["vision"]:
        tower = sum(weights["vision.onnx"])
        wanted = needed_bytes(checkpoint, item, prefix="model.visual.")
        out += [
            off("vision weight_bytes, against the tensors placed", vision["weight_bytes"], tower),
            off("vision weight_bytes, against the checkpoint's", vision["weight_bytes"], wanted),
            off("vision weight_bytes of the plan", plan["vision_weight_bytes"], tower),
        ]
    state, full = cache_figures(checkpoint, config)
    out += [
        off("cache_bytes, against the slab", config["cache_bytes"], plan["slab"]["nbytes"]),
        off("cache_bytes of the plan", plan["cache_bytes"], plan["slab"]["nbytes"]),
        off("full_cache_bytes of the plan", plan["full_cache_bytes"], full),
        off("tensors of the slab, against the formula", sum(e["nbytes"] for e in plan["slab"]["entries"]), state),
        Check("gaps in the plan's slab", gaps(plan["slab"]), 255, "bytes each"),
    ]
    sizes = {file.name: file.stat().st_size for file in package.iterdir() if file.name != "config.json"}
    stated = {name: entry["bytes"] for name, entry in config["files"].items()}
    wrong = [name for name in sizes.keys() | stated.keys() if sizes.get(name) != stated.get(name)]
    out.append(Check(f"sizes of {len(sizes)} files", len(wrong), 0, "wrong"))
    return out


def off(what: str, stated: int, found: int) -> Check:
    """That a stated number of bytes is what was found."""
    return Check(f"{what} ({found:,})", abs(stated - found), 0, "bytes off")


def placed_weights(package: Path, graph: Path) -> list[int]:
    """Bytes of each initialiser of a graph, as its place in a data file says.

    Raises:
        RuntimeError: one has another size than its shape, lies outside its file, or overlaps another.
    """
    places: dict[str, list[tuple[int, int, str]]] = {}
    for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        start, nbytes = int(place["offset"]), int(place["length"])
        if nbytes != math.prod(tensor.dims) * ONNX_ITEM[tensor.data_type]:
            raise RuntimeError(f"{graph}: {tensor.name} has {nbytes} bytes, not those of its shape")
        places.setdefault(place["location"], []).append((start, start + nbytes, tensor.name))
    for file, ranges in places.items():
        end = 0
        for start, stop, name in sorted(ranges):
            if start < end or stop > (package / file).stat().st_size:
                raise RuntimeError(f"{graph}: {name} overlaps another tensor in {file}, or ends beyond it")
            end = stop
    return [stop - start for ranges in places.values() for start, stop, _ in ranges]


def needed_bytes(checkpoint: Path, item: int, prefix: str = "") -> int:
    """Bytes of the checkpoint's tensors whose names begin with `prefix`, at `item` bytes a number.

    The gates' shared layer counts once; their bias, which is added in float32, takes 4 bytes a number.
    """
    if not list(checkpoint.glob("gates/*.safetensors")):
        raise RuntimeError(f"{checkpoint}/gates has no safetensors file")
    sizes: dict[str, int] = {}
    for file in sorted(checkpoint.glob("*/*.safetensors")):
        for name, entry in safetensors_header(file).items():
            key = SHARED_GATE if name.endswith(f"retention_gate.{SHARED_GATE}") else name
            if key.startswith(prefix):
                sizes[key] = math.prod(entry["shape"]) * (4 if name.endswith("retention_gate.bias") else item)
    return sum(sizes.values())


def safetensors_header(file: Path) -> dict[str, Any]:
    """Name -> dtype and shape of every tensor in a file."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return header


def cache_figures(checkpoint: Path, config: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes of the cache by the formula of the design, and of a full cache at the longest context, for one sequence."""
    source = json.loads((checkpoint / "base" / "config.json").read_text())
    text = source.get("text_config", source)
    layers, heads, dim = (text[name] for name in ("num_hidden_layers", "num_key_value_heads", "head_dim"))
    budget, recent, item = config["eviction"]["budget"], config["eviction"]["evict_every"], ITEM[config["precision"]]
    streams = layers * heads
    pool = streams * budget * (2 * dim * item + 12) + 4 * (streams + 1)
    tail = streams * recent * (2 * dim * item + 4) + 16
    return pool + tail, streams * text["max_position_embeddings"] * 2 * dim * item


def gaps(slab: Mapping[str, Any]) -> int:
    """The widest gap between tensors of a slab.

    Raises:
        RuntimeError: two overlap, or one is not aligned.
    """
    end = widest = 0
    for entry in slab["entries"]:
        start, nbytes = int(entry["offset"]), int(entry["nbytes"])
        if start < end or start % slab["alignment"]:
            raise RuntimeError(f"memory_plan.json: {entry['name']} overlaps the tensor before, or is not aligned")
        widest, end = max(widest, start - end), start + nbytes
    return max(widest, int(slab["nbytes"]) - end)


def main() -> None:
    """Check a package, and exit with 1 if a figure is off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, metavar="PACKAGE")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="what it was built from")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the checks there, and print nothing")
    options = parser.parse_args()
    checks = package_checks(options.package, options.checkpoint)
    if options.json:
        write_json(options.json, {"checks": [entry.as_dict() for entry in checks]})
        return
    print(header(describe_machine()))
    sys.exit(not print_checks(checks))


if __name__ == "__main__":
    main()
