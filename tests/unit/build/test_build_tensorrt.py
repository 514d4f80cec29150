"""Packages with TensorRT engines, built with a stand-in for TensorRT (tests/fake_tensorrt.py)."""

import sys
from pathlib import Path
from typing import Any

import fake_tensorrt
import onnx
import pytest
from support import MAX_IMAGE_TOKENS, build

from trimkv_export.backends.tensorrt import CREATORS, PLUGIN, import_tensorrt
from trimkv_export.build.builder import build_package
from trimkv_export.config import BuildOptions, EngineWeights, Target
from trimkv_export.errors import EngineError, MissingDependencyError, OptionError, OutputError
from trimkv_export.graph.ops import DOMAIN, DOMAIN_VERSION, POOL_ATTENTION, POOL_UPDATE
from trimkv_export.package import Package

FLAGS = fake_tensorrt.BuilderFlag


pytestmark = pytest.mark.usefixtures("tensorrt")


def options(checkpoint: Path, output: Path, **changes: Any) -> BuildOptions:
    values: dict[str, Any] = {
        "model": str(checkpoint / "base"), "gates": str(checkpoint / "gates"), "budget": 8, "prefill_chunk": 16,
        "max_image_tokens": MAX_IMAGE_TOKENS, "target": Target.TENSORRT,
    }  # fmt: skip
    return BuildOptions(output=output, **values | changes)


def test_the_engine_is_part_of_the_package(checkpoint: Path, tmp_path: Path) -> None:
    report = build_package(options(checkpoint, tmp_path / "package", max_batch=3))
    config = Package.open(tmp_path / "package").config
    assert (config.target, report.as_dict()["engines"]) == ("tensorrt", ["decoder.engine"])
    assert config.engine is not None
    assert (config.engine.version, config.engine.max_batch) == ("10.3.0", 3)
    added = {"decoder.engine", "decoder.engine.json", "decoder.tensorrt.onnx", PLUGIN}
    assert added <= set(config.files)
    assert set(config.files) - added == set(build(checkpoint, tmp_path / "plain").config.files)


def test_profiles_flags_and_memory(visual_checkpoint: Path, tmp_path: Path) -> None:
    package = tmp_path / "package"
    build_package(options(visual_checkpoint, package, max_batch=3, device="l4", precision="fp16"))
    decoder, vision = fake_tensorrt.BUILT
    prefill, decode = decoder["profiles"]
    assert prefill["input_ids"] == [[1, 1], [1, 16], [1, 16]]
    assert prefill["position_ids"] == [[3, 1, 1], [3, 1, 16], [3, 1, 16]]
    assert prefill["visual_embeds"] == [[0, 32], [16, 32], [16, 32]]
    assert decode["input_ids"] == [[1, 1], [3, 1], [3, 1]]
    assert decode["visual_index"] == [[0], [0], [0]]
    cache = Package.open(package).config.cache
    for tensor in cache.tensors():
        shape = list(tensor.shape[1:])
        assert prefill[f"past.{tensor.name}"] == [[1, *shape]] * 3
        assert decode[f"past.{tensor.name}"] == [[1, *shape], [3, *shape], [3, *shape]]
    assert [sizes["pixel_values"][2][:2] for sizes in vision["profiles"]] == [[1, 4 * MAX_IMAGE_TOKENS]]
    for built in (decoder, vision):
        assert built["creation_flags"] == 1 << fake_tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        assert built["flags"] == set()  # no TF32
        assert built["limits"][fake_tensorrt.MemoryPoolType.WORKSPACE] > 10**9  # what the plan leaves of an L4


@pytest.mark.parametrize(
    ("weights", "flags"),
    [("stripped", {FLAGS.STRIP_PLAN, FLAGS.REFIT_IDENTICAL}), ("streamed", {FLAGS.WEIGHT_STREAMING})],
)
def test_weights(checkpoint: Path, tmp_path: Path, weights: str, flags: set[Any]) -> None:
    build_package(options(checkpoint, tmp_path / "package", engine_weights=weights))
    assert fake_tensorrt.BUILT[0]["flags"] == flags
    config = Package.open(tmp_path / "package").config
    assert config.engine is not None
    assert config.engine.weights is EngineWeights(weights)


def test_the_parser_gets_plugins_and_the_gates_bodies(visual_checkpoint: Path, tmp_path: Path) -> None:
    build_package(options(visual_checkpoint, tmp_path / "package"))
    model = onnx.load(str(tmp_path / "package/decoder.tensorrt.onnx"), load_external_data=False)
    assert [function.name for function in model.functions] == ["RetentionGate10", "LogSigmoid"]
    whole = onnx.load(str(tmp_path / "package/decoder.onnx"))
    gates = {"RetentionGate10", "LogSigmoid"}
    assert {function.name for function in whole.functions} == gates | {POOL_ATTENTION, POOL_UPDATE}
    vision = onnx.load(str(tmp_path / "package/vision.tensorrt.onnx"))  # its weights are found from there
    assert [function.name for function in vision.functions] == ["MultiHeadAttention"]


def test_operators_that_an_older_parser_does_not_know(visual_checkpoint: Path, tmp_path: Path) -> None:
    missing = {"RMSNormalization", "RotaryEmbedding", "Attention"}
    fake_tensorrt.UNKNOWN_OPERATORS |= missing
    build_package(options(visual_checkpoint, tmp_path / "package", precision="fp16"))
    for name in ("decoder", "vision"):
        model = onnx.load(str(tmp_path / f"package/{name}.tensorrt.onnx"))
        whole = onnx.load(str(tmp_path / f"package/{name}.onnx"))
        assert not missing & {node.op_type for node in model.graph.node}
        assert [tensor.name for tensor in model.graph.input] == [tensor.name for tensor in whole.graph.input]
        assert len(model.graph.initializer) == len(whole.graph.initializer)


def test_a_node_that_the_parser_refuses_is_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tensorrt.UNKNOWN_OPERATORS.add("Gemm")  # which ONNX does not define by others
    with pytest.raises(EngineError, match=r"decoder.onnx.*parser refuses it: node '.*' \(Gemm\): .*; and \d+ more"):
        build_package(options(checkpoint, tmp_path / "package"))
    assert not (tmp_path / "package").exists()


def test_a_plugin_library_of_another_tensorrt(checkpoint: Path, tmp_path: Path, tensorrt: Path) -> None:
    tensorrt.write_bytes(b"nothing in it")
    with pytest.raises(EngineError, match=r"has no plugin PoolAttention .*Build the library for this major version"):
        build_package(options(checkpoint, tmp_path / "package"))


def test_no_plugin_library(checkpoint: Path, tmp_path: Path, tensorrt: Path) -> None:
    tensorrt.unlink()
    with pytest.raises(EngineError, match="was not built; run `make -B plugins CUDA=ON"):
        build_package(options(checkpoint, tmp_path / "package"))


def test_no_tensorrt(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependencyError, match=r"JetPack 6.2 has TensorRT 10.3.*tensorrt-cu13.*tensorrt-cu12"):
        build_package(options(checkpoint, tmp_path / "package"))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingDependencyError, match="tensorrt-rtx"):
        import_tensorrt(Target.TENSORRT_RTX)


def test_no_gpu(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def builder(log: Any) -> None:
        log.log(fake_tensorrt.ILogger.ERROR, "no CUDA-capable device is detected")
        raise TypeError("factory function returned nullptr")

    monkeypatch.setattr(fake_tensorrt, "Builder", builder)
    with pytest.raises(EngineError, match="cannot make a builder: no CUDA-capable device"):
        build_package(options(checkpoint, tmp_path / "package"))


class TestTimingCache:
    def test_is_read_and_written(self, checkpoint: Path, tmp_path: Path) -> None:
        file = tmp_path / "timing"
        for expected in (b"+", b"++"):
            build_package(options(checkpoint, tmp_path / "package", timing_cache=file, overwrite=True))
            assert file.read_bytes() == expected
        assert [path.name for path in tmp_path.glob("timing*")] == ["timing"]

    def test_of_another_device(self, checkpoint: Path, tmp_path: Path) -> None:
        (tmp_path / "timing").write_bytes(b"other")
        with pytest.raises(OptionError, match=r"timing-cache .*timing is not a timing cache, or is of another device"):
            build_package(options(checkpoint, tmp_path / "package", timing_cache=tmp_path / "timing"))

    def test_that_cannot_be_read_or_written(self, checkpoint: Path, tmp_path: Path) -> None:
        """It is said before the minutes of building, not after them."""
        for file, said in ((tmp_path, "is a folder: name a file in it"), (tmp_path / "no/folder", "cannot be written")):
            with pytest.raises(OutputError, match=said):
                build_package(options(checkpoint, tmp_path / "package", timing_cache=file))


def test_progress(checkpoint: Path, tmp_path: Path) -> None:
    seen: list[Any] = []
    build_package(options(checkpoint, tmp_path / "package"), lambda *report: seen.append(report))
    assert ("decoder.engine: Building", 1, 2) in seen

    def fail(what: str, *_: int) -> None:
        if "engine" in what:
            raise BrokenPipeError("the reader went away")

    with pytest.raises(OutputError, match="the reader went away"):
        build_package(options(checkpoint, tmp_path / "other"), fail)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"target": "tensorflow"},
            "onnxruntime, tensorrt, tensorrt-llm, tensorrt-rtx, got 'tensorflow'",
        ),
        ({"engine_weights": "some"}, "engine-weights must be one of included, stripped, streamed, got 'some'"),
        ({"target": "onnxruntime", "engine_weights": "stripped"}, "engine-weights stripped is for TensorRT engines"),
        ({"target": "tensorrt-llm", "engine_weights": "streamed"}, "engine-weights streamed is not for tensorrt-llm"),
        ({"target": "tensorrt-rtx", "timing_cache": Path("x")}, "timing-cache x is for --target tensorrt"),
        ({"target": "tensorrt-rtx", "max_batch": 2}, "max-batch 2 is for the plan of a device"),
    ],
)
def test_bad_options(checkpoint: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        options(checkpoint, tmp_path / "package", **changes)


def test_the_plugins_go_by_the_names_of_the_graph() -> None:
    assert {name: (DOMAIN, str(DOMAIN_VERSION)) for name in (POOL_ATTENTION, POOL_UPDATE)} == CREATORS
