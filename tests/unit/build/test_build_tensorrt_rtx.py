"""Vision towers built by TensorRT-RTX itself, which needs no GPU for it."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import onnx
import pytest
from seeing import FAMILIES, make_seeing_checkpoint
from support import MAX_IMAGE_TOKENS, Cli, build, make_checkpoint, make_visual_checkpoint

from trimkv_export.backends.tensorrt import PLUGIN
from trimkv_export.build.builder import build_package
from trimkv_export.build.tensorrt import EngineBuilder, Profile, decoder_profiles, vision_profiles
from trimkv_export.config import BuildOptions, Target
from trimkv_export.errors import EngineError, OptionError
from trimkv_export.graph.tensorrt import PLUGINS, for_tensorrt, standard_operators
from trimkv_export.package import Package

pytest.importorskip("tensorrt_rtx", reason="not installed: pip install tensorrt-rtx-cu13")


def options(checkpoint: Path, output: Path, **changes: Any) -> BuildOptions:
    values: dict[str, Any] = {
        "model": str(checkpoint / "base"), "gates": str(checkpoint / "gates"), "budget": 8,
        "max_image_tokens": MAX_IMAGE_TOKENS, "target": Target.TENSORRT_RTX,
    }  # fmt: skip
    return BuildOptions(output=output, **values | changes)


@pytest.fixture
def builder(visual_checkpoint: Path, tmp_path: Path) -> EngineBuilder:
    return EngineBuilder(options(visual_checkpoint, tmp_path / "unused"), lambda *_: None)


@pytest.fixture
def profiles(visual_package: Path) -> list[Profile]:
    return vision_profiles(Package.open(visual_package).config)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_vision_tower_becomes_an_engine(visual_checkpoint: Path, tmp_path: Path, precision: str) -> None:
    seen: set[str] = set()
    report = build_package(
        options(visual_checkpoint, tmp_path / "package", precision=precision), lambda what, *_: seen.add(what)
    )
    config = Package.open(tmp_path / "package").config
    assert (config.target, report.as_dict()["engines"]) == ("tensorrt-rtx", ["vision.engine"])
    assert config.vision is not None
    assert config.files["vision.engine"]["bytes"] > config.vision.weight_bytes
    assert not {PLUGIN, "decoder.engine"} & set(config.files)  # RTX knows no plugins
    assert any(what.startswith("vision.engine: ") for what in seen)


@pytest.mark.parametrize("form", [("int4", 64), ("int8", 32)], ids=str)
@pytest.mark.usefixtures("tensorrt")
def test_the_tower_of_a_quantised_model(
    tmp_path: Path, builder: EngineBuilder, monkeypatch: pytest.MonkeyPatch, form: tuple[str, int]
) -> None:
    """Of packages for TensorRT-RTX, and for TensorRT as TensorRT-RTX takes it."""
    checkpoint = make_visual_checkpoint(tmp_path, hidden=64, intermediate=128, heads=4, kv_heads=2, head_dim=16)
    values = {"precision": form[0], "block_size": form[1], "activations": "fp16"}
    report = build_package(options(checkpoint, tmp_path / "rtx", **values))
    assert report.as_dict()["engines"] == ["vision.engine"]
    with monkeypatch.context() as patch:
        patch.setattr(EngineBuilder, "build", lambda *_: None)
        package = build_package(options(checkpoint, tmp_path / "package", **values | {"target": "tensorrt"})).path
    builder.build(package / "vision.onnx", tmp_path / "vision.engine", vision_profiles(Package.open(package).config))
    assert (tmp_path / "vision.engine").stat().st_size > 10**6


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("unsupported", [(), ("Attention", "RMSNormalization", "RotaryEmbedding")])
def test_other_towers(family: str, unsupported: tuple[str, ...], tmp_path: Path, builder: EngineBuilder) -> None:
    """With windows, and for images of one size; also as a parser of JetPack 6.2 gets them."""
    make_seeing_checkpoint(tmp_path, family)
    package = build(tmp_path, tmp_path / "package", max_image_tokens=MAX_IMAGE_TOKENS).path
    model = for_tensorrt(onnx.load(str(package / "vision.onnx")), unsupported)
    assert not set(unsupported) & standard_operators(model)
    onnx.save(model, str(tmp_path / "vision.onnx"))
    profiles = vision_profiles(Package.open(package).config)
    builder.build(tmp_path / "vision.onnx", tmp_path / "vision.engine", profiles)
    assert (tmp_path / "vision.engine").stat().st_size > 10**6


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("unsupported", [(), ("RMSNormalization", "RotaryEmbedding")])
def test_a_decoder_but_for_its_plugins(
    visual_checkpoint: Path, tmp_path: Path, builder: EngineBuilder, precision: str, unsupported: tuple[str, ...]
) -> None:
    """TensorRT-RTX knows no plugins. The rest of the graph, the profiles and the types are taken by it."""
    package = build(visual_checkpoint, tmp_path / "package", precision=precision).path
    build_without_plugins(package, builder, unsupported)


@pytest.mark.parametrize("form", [("int4", 64), ("int4", 128), ("int8", 32)], ids=str)
@pytest.mark.parametrize("activations", ["fp32", "fp16", "bf16"])
@pytest.mark.usefixtures("tensorrt")
def test_a_quantised_decoder_but_for_its_plugins(
    tmp_path: Path, builder: EngineBuilder, monkeypatch: pytest.MonkeyPatch, form: tuple[str, int], activations: str
) -> None:
    """The engine is no larger than numbers and scales are, so it holds these and no matrices in float."""
    checkpoint = make_checkpoint(tmp_path, hidden=512, intermediate=2048, heads=4, kv_heads=2, head_dim=128)
    with monkeypatch.context() as patch:
        patch.setattr(EngineBuilder, "build", lambda *_: None)
        report = build(
            checkpoint, tmp_path / "package", precision=form[0], block_size=form[1], activations=activations,
            target="tensorrt",
        )  # fmt: skip
    engine = build_without_plugins(report.path, builder, ())
    assert engine < report.config.weight_bytes + (8 << 20)  # of kernels; in 16 bits the matrices are 24 MB


def build_without_plugins(package: Path, builder: EngineBuilder, unsupported: tuple[str, ...]) -> int:
    """Bytes of the engine."""
    model = for_tensorrt(onnx.load(str(package / "decoder.onnx")), unsupported)
    for node in model.graph.node:
        if node.op_type in PLUGINS:  # what comes out is shaped like what goes in at its place
            same = [onnx.helper.make_node("Identity", [a], [b]) for a, b in zip(node.input, node.output, strict=False)]
            model.graph.node.extend(same)
    rest = [node for node in model.graph.node if node.op_type not in PLUGINS]
    del model.graph.node[:]
    model.graph.node.extend(sorted_nodes(rest, model))
    graph, engine = package.with_name("decoder.onnx"), package.with_name("decoder.engine")
    onnx.save(model, str(graph))
    builder.build(graph, engine, decoder_profiles(Package.open(package).config, 3))
    assert engine.stat().st_size > 10**6
    return engine.stat().st_size


def sorted_nodes(nodes: list[onnx.NodeProto], model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Each node behind those that it reads from."""
    known = {tensor.name for tensor in [*model.graph.input, *model.graph.initializer]}
    done: list[onnx.NodeProto] = []
    while nodes:
        ready = [node for node in nodes if set(node.input) <= known]
        assert ready
        known |= {name for node in ready for name in node.output}
        done += ready
        nodes = [node for node in nodes if node not in ready]
    return done


class TerminatedError(Exception):
    """What the handler of SIGTERM raises."""


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, TerminatedError)])
def test_a_signal_ends_the_build(
    visual_checkpoint: Path, tmp_path: Path, number: signal.Signals, raised: type[BaseException]
) -> None:
    def terminate(*_: object) -> None:
        raise TerminatedError

    def interrupt(what: str, *_: int) -> None:
        if what.startswith("vision.engine"):
            os.kill(os.getpid(), number)

    handlers = {signal.SIGINT: signal.getsignal(signal.SIGINT), signal.SIGTERM: terminate}
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        with pytest.raises(raised):
            build_package(options(visual_checkpoint, tmp_path / "package"), interrupt)
        assert signal.getsignal(number) is handlers[number]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not list(tmp_path.iterdir())


def test_for_one_device(visual_checkpoint: Path, tmp_path: Path) -> None:
    build_package(options(visual_checkpoint, tmp_path / "l4", device="l4"))
    with pytest.raises(
        OptionError, match=r"does not build for orin-nano-8gb \(compute capability 8.7\); it builds for SM75"
    ):
        build_package(options(visual_checkpoint, tmp_path / "orin", device="orin-nano-8gb"))


def test_a_text_model_is_refused(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    done = cli(
        "build", "--model", checkpoint / "base", "--gates", checkpoint / "gates", "--budget", 8, "--output",
        tmp_path / "package", "--target", "tensorrt-rtx",
    )  # fmt: skip
    assert done.code == 5
    assert "cannot run the decoder, which needs plugins for its cache" in done.err
    assert "qwen3 has none. Use --target tensorrt" in done.err
    assert not (tmp_path / "package").exists()


def test_the_command(cli: Cli, visual_checkpoint: Path, tmp_path: Path) -> None:
    arguments = (
        "build", "--model", visual_checkpoint / "base", "--gates", visual_checkpoint / "gates", "--budget", 8,
        "--max-image-tokens", 16, "--target", "tensorrt-rtx", "--output", tmp_path / "package",
    )  # fmt: skip
    done = cli(*arguments, "--json")
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)["engines"] == ["vision.engine"]
    assert "vision.engine" in cli(*arguments, "--overwrite").out


class TestBrokenGraphs:
    """Each gives one error with what TensorRT says of it."""

    def check(self, builder: EngineBuilder, graph: Path, profiles: list[Profile], said: str) -> None:
        with pytest.raises(EngineError, match=said):
            builder.build(graph, graph.with_suffix(".engine"), profiles)
        assert not graph.with_suffix(".engine").exists()

    def test_no_onnx_at_all(self, builder: EngineBuilder, tmp_path: Path, profiles: list[Profile]) -> None:
        (tmp_path / "vision.onnx").write_bytes(b"garbage")
        self.check(
            builder,
            tmp_path / "vision.onnx",
            profiles,
            "vision.onnx cannot be read as an ONNX graph",
        )

    def test_missing_weights(
        self, builder: EngineBuilder, visual_package: Path, tmp_path: Path, profiles: list[Profile]
    ) -> None:
        (tmp_path / "vision.onnx").write_bytes((visual_package / "vision.onnx").read_bytes())
        self.check(builder, tmp_path / "vision.onnx", profiles, "vision.onnx: TensorRT's parser refuses it: .*")

    def test_an_unknown_operator(
        self, builder: EngineBuilder, visual_package: Path, tmp_path: Path, profiles: list[Profile]
    ) -> None:
        model = onnx.load(str(visual_package / "vision.onnx"))
        gemm = next(node for node in model.graph.node if node.op_type == "Gemm")
        gemm.op_type = "Germ"
        onnx.save(model, str(tmp_path / "vision.onnx"))
        self.check(builder, tmp_path / "vision.onnx", profiles, rf"node '{gemm.name}' \(Germ\): .*Plugin not found")

    def test_shapes_that_do_not_fit(
        self, builder: EngineBuilder, visual_package: Path, tmp_path: Path, profiles: list[Profile]
    ) -> None:
        model = onnx.load(str(visual_package / "vision.onnx"))
        weight = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("blocks.0.attn.qkv.weight"))
        weight.dims[0], weight.dims[1] = weight.dims[1], weight.dims[0]
        onnx.save(model, str(tmp_path / "vision.onnx"))
        self.check(builder, tmp_path / "vision.onnx", profiles, "vision.onnx: TensorRT.*attn.qkv")
