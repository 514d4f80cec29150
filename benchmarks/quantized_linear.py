"""Speed of QuantizedLinear at a model's shapes: the native kernel against ONNX Runtime's MatMulNBits, in one run.

    python benchmarks/quantized_linear.py [--rows 9728] [--columns 2560] [--layers 24] [--bits 4] [--block-size 32]
                                          [--scales float16] [--tokens 1 16 256] [--json FILE]

Matrices of that many layers, each different and read from a file in turns, so that none is in a cache; milliseconds and
tokens a second of all, the rate at which one token reads them, and the rate of reading as many bytes in order (BLAS's
sdot, a part on each core).
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from common import GB, describe_machine, header, median_seconds, read_rate, table, write_json
from onnx import helper

from trimkv_export.backends.native import QUANTIZED_LINEAR_ENTRY, find_library, has_quantized_kernels
from trimkv_export.config import Quantization
from trimkv_export.graph.builder import OPSET
from trimkv_export.graph.functions import QUANTIZED_DOMAIN, QUANTIZED_LINEAR, quantized_functions
from trimkv_export.graph.ops import DOMAIN, DOMAIN_VERSION
from trimkv_export.graph.weights import TENSOR_TYPES, Weight


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, default=find_library(), help="default: where `make plugins` puts it")
    for name, value in (("rows", 9728), ("columns", 2560), ("layers", 24), ("block-size", 32), ("repeat", 20)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--scales", choices=("float16", "float32"), default="float16")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--json", type=Path, metavar="FILE")
    a = parser.parse_args()
    if not has_quantized_kernels(a.library):
        parser.error("no native kernel for this processor: it needs AVX-512 VNNI, and `make plugins`")
    form = Quantization(a.bits, a.block_size)
    weights = [Weight(f"{layer}.weight", (a.rows, a.columns), a.scales, form) for layer in range(a.layers)]
    nbytes = sum(weight.nbytes for weight in weights)
    found: dict[str, dict[int, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = _write(Path(folder), weights, form)
        for name, library in (("native", a.library), ("MatMulNBits", None)):
            session = _session(model, library)
            found[name] = {}
            for tokens in a.tokens:
                feed = {"x": np.random.default_rng(0).standard_normal((tokens, a.columns), np.float32)}
                found[name][tokens] = median_seconds(partial(session.run, None, feed), max(3, a.repeat // tokens))
            del session
    rate = read_rate(nbytes, a.repeat)
    machine = describe_machine()
    print(header(machine))
    print(f"{nbytes / GB:.2f} GB in {a.layers} matrices; reading as much in order: {rate:.1f} GB/s\n")
    rows = [
        [f"{name}, {tokens} tokens", f"{1e3 * seconds:.1f}", f"{tokens / seconds:.0f}", f"{nbytes / seconds / GB:.1f}"]
        for name, times in found.items()
        for tokens, seconds in times.items()
    ]
    print(table(("", "ms", "tokens/s", "GB/s of weights"), rows))
    write_json(a.json, {"machine": machine, "bytes": nbytes, "read_gb_s": rate, "seconds": found})


def _write(folder: Path, weights: list[Weight], form: Quantization) -> Path:
    """A model of a node for each matrix, of random numbers, in `folder`."""
    rng, parts = np.random.default_rng(0), []
    for weight in weights:
        for part in weight.initializers:
            kind = np.dtype(part.dtype)
            array = (
                rng.integers(0, 256, part.shape, np.uint8) if kind == np.uint8 else rng.uniform(1e-3, 1e-2, part.shape)
            )
            parts.append(onnx.numpy_helper.from_array(array.astype(kind), part.name))
    rows, columns = weights[0].shape
    nodes = [
        helper.make_node(
            QUANTIZED_LINEAR[0], ["x", *weight.inputs], [f"y{number}"], domain=DOMAIN,
            K=columns, N_0=rows, bits=form.bits, block_size=form.block_size,
        )
        for number, weight in enumerate(weights)
    ]  # fmt: skip
    info, float32 = helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    outputs = [info(f"y{number}", float32, [None, rows]) for number in range(len(weights))]
    graph = helper.make_graph(nodes, "linear", [info("x", float32, [None, columns])], outputs, initializer=parts)
    model = helper.make_model(
        graph, ir_version=11, functions=quantized_functions(form, form, float32, TENSOR_TYPES[weights[0].dtype]),
        opset_imports=[
            helper.make_opsetid(name, version)
            for name, version in (("", OPSET), (DOMAIN, DOMAIN_VERSION), (QUANTIZED_DOMAIN, 1))
        ],
    )  # fmt: skip
    file = folder / "linear.onnx"
    onnx.save_model(model, file, save_as_external_data=True, location="linear.data")
    return file


def _session(model: Path, library: Path | None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if library is not None:
        options.add_session_config_entry(QUANTIZED_LINEAR_ENTRY, "1")
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    main()
