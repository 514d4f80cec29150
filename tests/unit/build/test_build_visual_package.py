"""Packages of Qwen3-VL: both graphs hold the checkpoint's tensors, and what does not fit is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from converted_checkpoints import DTYPES, convert_checkpoint, tensors
from pictures import picture
from safetensors.numpy import load_file, save_file
from support import IMAGE, build, copy_package, initializers, make_visual_checkpoint, seal

from trimkv_export.errors import CheckpointError, EngineError, OptionError, PackageError, UnsupportedModelError
from trimkv_export.package import Package
from trimkv_export.package import package as package_module
from trimkv_export.runtime import Engine

VISUAL = "model.visual."


def logits(package: Path) -> Any:
    with Engine.open(package, threads=1) as engine, engine.session() as session:
        return session.prefill([1, IMAGE, 2], [picture(64, 96)])


def assert_weights_equal(package: Path, checkpoint: Path, precision: str) -> None:
    """Names, types and bytes of both graphs' weights, and the bytes that config.json counts."""
    expected, dtype = tensors(checkpoint), DTYPES[precision]
    if any(file.stat().st_nlink > 1 for file in package.iterdir()):
        package = copy_package(package, package.parent / "copied")  # onnx reads no file of several names
    decoder, vision = initializers(package), initializers(package, "vision.onnx")
    assert set(decoder) | set(vision) == set(expected)
    assert {name for name in expected if name.startswith(VISUAL)} == set(vision)
    assert not set(decoder) & set(vision)
    for name, value in (decoder | vision).items():
        wanted = np.dtype(np.float32) if name.endswith("retention_gate.bias") else dtype
        assert value.dtype == wanted, name
        assert value.size == expected[name].size, name
        assert value.tobytes() == expected[name].astype(wanted).tobytes(), name
    config = Package.open(package).config
    assert config.vision is not None
    assert config.vision.weight_bytes == sum(value.nbytes for value in vision.values())
    assert config.weight_bytes == sum(value.nbytes for value in (decoder | vision).values())
    plan = json.loads((package / "memory_plan.json").read_text())
    assert (plan["weight_bytes"], plan["vision_weight_bytes"]) == (config.weight_bytes, config.vision.weight_bytes)
    for file in ("decoder.onnx", "vision.onnx"):
        onnx.checker.check_model(str(package / file), full_check=True)


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(("shards", "weights"), [(1, "copy"), (3, "link")])
def test_every_dtype_to_every_precision(
    visual_checkpoint: Path, tmp_path: Path, source: str, precision: str, shards: int, weights: str
) -> None:
    converted = convert_checkpoint(visual_checkpoint, tmp_path / "checkpoint", DTYPES[source], shards)
    path = build(converted, tmp_path / "package", precision=precision, weights=weights).path
    assert_weights_equal(path, converted, precision)
    if precision != "bf16":
        assert np.isfinite(logits(path)).all()


@pytest.mark.parametrize(("shards", "weights"), [(1, "copy"), (1, "link"), (4, "link")])
def test_what_needs_no_conversion_is_the_checkpoints_own_file(
    visual_checkpoint: Path, tmp_path: Path, shards: int, weights: str
) -> None:
    source = convert_checkpoint(visual_checkpoint, tmp_path / "checkpoint", DTYPES["fp32"], shards)
    path = build(source, tmp_path / "package", weights=weights).path
    assert_weights_equal(path, source, "fp32")
    files = sorted((source / "base").glob("*.safetensors"))
    assert len(files) == shards
    for file in files:  # one file for both graphs
        assert (path / file.name).read_bytes() == file.read_bytes()
        assert (path / file.name).samefile(file) == (weights == "link")
    assert not (path / "vision.onnx.data").exists()
    assert (path / "decoder.onnx.data").stat().st_size < 40_000  # the gates
    moved = copy_package(path, tmp_path / "moved")
    assert logits(moved).tobytes() == logits(path).tobytes()


def test_converted_weights_lie_beside_their_graph(visual_package: Path) -> None:
    config = Package.open(visual_package).config
    assert config.vision is not None
    assert {"decoder.onnx.data", "vision.onnx.data"} <= set(config.files)
    for data, size in (
        ("vision.onnx.data", config.vision.weight_bytes),
        ("decoder.onnx.data", config.weight_bytes - config.vision.weight_bytes),
    ):
        assert size <= (visual_package / data).stat().st_size < size + 64 * 200
        graph = onnx.load(str(visual_package / data.removesuffix(".data")), load_external_data=False).graph
        locations = {
            entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"
        }
        assert locations == {data}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_vision_tower_in_another_type(visual_checkpoint: Path, tmp_path: Path, precision: str, shards: int) -> None:
    """Decoder in bfloat16, vision tower in float32, in one file or in two."""
    source = tmp_path / "checkpoint"
    shutil.copytree(visual_checkpoint, source)
    file = source / "base" / "model.safetensors"
    found = load_file(file)
    parts: list[dict[str, Any]] = [
        {name: value for name, value in found.items() if not name.startswith(VISUAL)},
        {name: value.astype(np.float32) for name, value in found.items() if name.startswith(VISUAL)},
    ]
    if shards == 1:
        save_file(parts[0] | parts[1], file)
    else:
        file.unlink()
        names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
        for name, part in zip(names, parts, strict=True):
            save_file(part, source / "base" / name)
        weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
        (source / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    path = build(source, tmp_path / "package", precision=precision).path
    assert_weights_equal(path, source, precision)


@pytest.mark.parametrize("gate", ["rg", "rg10"])
@pytest.mark.parametrize("tie", [True, False])
def test_heads_and_gates(tmp_path: Path, gate: str, tie: bool) -> None:
    source = make_visual_checkpoint(tmp_path / "checkpoint", gate=gate, tie=tie)
    report = build(source, tmp_path / "package")
    assert_weights_equal(report.path, source, "fp32")
    assert ("lm_head.weight" in initializers(report.path)) is not tie
    assert report.config.model.gate_kind == gate
    assert report.config.eviction.policy == {"rg": "per_head", "rg10": "global"}[gate]


def test_gates_whose_fields_are_nested(visual_checkpoint: Path, tmp_path: Path) -> None:
    """Official Qwen3-VL gates name their kind in text_config; at the top is as good, and nothing at all is not."""
    source = tmp_path / "checkpoint"
    shutil.copytree(visual_checkpoint, source)
    file = source / "gates" / "config.json"
    config = json.loads(file.read_text())
    nested = config["text_config"]
    assert "retention_gate" in nested
    assert "retention_gate" not in config
    expected = logits(build(source, tmp_path / "nested").path)
    kind = nested.pop("retention_gate")
    file.write_text(json.dumps(config | {"retention_gate": kind}))
    assert logits(build(source, tmp_path / "top").path).tobytes() == expected.tobytes()
    file.write_text(json.dumps({**config, "text_config": nested | {"retention_gate": "rg7"}}))
    with pytest.raises(UnsupportedModelError, match="rg7"):
        build(source, tmp_path / "unknown")


def edited(source: Path, target: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """A checkpoint whose base weights were changed."""
    shutil.copytree(source, target)
    file = target / "base" / "model.safetensors"
    found = load_file(file)
    edit(found)
    save_file(found, file)
    return target


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing": (lambda t: t.pop(f"{VISUAL}blocks.1.attn.qkv.bias"), r"missing 'model.visual.blocks.1.attn.qkv.bias'"),
    "missing merger": (
        lambda t: t.pop(f"{VISUAL}deepstack_merger_list.2.norm.weight"),
        r"missing 'model.visual.deepstack_merger_list.2.norm.weight'",
    ),
    "no tower": (
        lambda t: [t.pop(name) for name in list(t) if name.startswith(VISUAL)],
        r"missing 'model.visual..* and \d+ more",
    ),
    "a block more": (
        lambda t: t.update({f"{VISUAL}blocks.4.norm1.bias": np.zeros(16, np.float32)}),
        r"unexpected 'model.visual.blocks.4.norm1.bias'",
    ),
    "shape": (
        lambda t: t.update({f"{VISUAL}pos_embed.weight": np.zeros((255, 16), np.float32)}),
        r"'model.visual.pos_embed.weight' is \[255, 16\], expected \[256, 16\]",
    ),
    "flat patches": (
        lambda t: t.update({f"{VISUAL}patch_embed.proj.weight": np.zeros((16, 1536), np.float32)}),
        r"patch_embed.proj.weight' is \[16, 1536\], expected \[16, 3, 2, 16, 16\]",
    ),
    "quantised": (
        lambda t: t.update({f"{VISUAL}blocks.0.mlp.linear_fc1.weight": np.zeros((32, 16), np.int8)}),
        r"blocks.0.mlp.linear_fc1.weight' is int8",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_tensors_that_do_not_match_the_config(visual_checkpoint: Path, tmp_path: Path, name: str) -> None:
    edit, said = EDITS[name]
    source = edited(visual_checkpoint, tmp_path / "checkpoint", edit)
    with pytest.raises(CheckpointError, match=said):
        build(source, tmp_path / "package")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_value_that_float16_cannot_hold(visual_checkpoint: Path, tmp_path: Path) -> None:
    name = f"{VISUAL}merger.linear_fc1.bias"
    source = edited(
        visual_checkpoint, tmp_path / "checkpoint", lambda t: t.update({name: np.full(64, 7e4, np.float32)})
    )
    with pytest.raises(CheckpointError, match=f"{name} holds 70000, which float16"):
        build(source, tmp_path / "package", precision="fp16")
    build(source, tmp_path / "package", precision="bf16")


@pytest.mark.parametrize("name", ["vision.onnx", "vision.onnx.data", "preprocessor_config.json"])
@pytest.mark.parametrize("quick", [True, False])
def test_changed_and_missing_files(
    visual_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, quick: bool
) -> None:
    bad = copy_package(visual_package, tmp_path / "bad")
    if not quick:  # as if every file were too large to be read at opening
        monkeypatch.setattr(package_module, "QUICK_BYTES", 0)
    whole = (bad / name).read_bytes()
    (bad / name).write_bytes(whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
    if quick:
        for vision in (True, False):  # also where it is not needed
            with pytest.raises(PackageError, match=f"{name} was changed after the build"):
                Engine.open(bad, vision=vision)
    with pytest.raises(PackageError, match=f"{name} was changed after the build"):
        Package.open(bad).verify_large_files()
    (bad / name).write_bytes(whole[:-1])
    with pytest.raises(PackageError, match=f"{name} has .* the build wrote"):
        Engine.open(bad)
    (bad / name).unlink()
    with pytest.raises(PackageError, match=f"{name} is missing"):
        Engine.open(bad)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda vision: vision.pop("depth"), "was changed after the build"),
        (lambda vision: vision.update(more=1), "was changed after the build"),
    ],
)
def test_sealed_nonsense(
    visual_package: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    bad = copy_package(visual_package, tmp_path / "bad")
    vision = json.loads((bad / "config.json").read_text())["vision"]
    change(vision)
    seal(bad, {"vision": vision})
    with pytest.raises(PackageError, match=said):
        Package.open(bad)


def test_a_vision_graph_that_does_not_load(visual_package: Path, tmp_path: Path) -> None:
    bad = copy_package(visual_package, tmp_path / "bad")
    (bad / "vision.onnx").write_bytes(onnx.ModelProto(ir_version=11).SerializeToString())
    seal(bad)
    with pytest.raises(EngineError, match=r"ONNX Runtime cannot load vision\.onnx"):
        Engine.open(bad)
    with Engine.open(bad, vision=False) as engine:
        engine.session().step([1])


def test_preprocessors_go_into_the_package(visual_checkpoint: Path, visual_package: Path) -> None:
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        assert (visual_package / name).read_bytes() == (visual_checkpoint / "base" / name).read_bytes()
        assert name in Package.open(visual_package).config.files


def test_the_one_file_of_transformers_5(visual_checkpoint: Path, visual_package: Path, tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    shutil.copytree(visual_checkpoint, source)
    sections = {}
    for section, name in (
        ("image_processor", "preprocessor_config.json"),
        ("video_processor", "video_preprocessor_config.json"),
    ):
        sections[section] = json.loads((source / "base" / name).read_text())
        (source / "base" / name).unlink()
    (source / "base" / "processor_config.json").write_text(json.dumps(sections))
    assert logits(build(source, tmp_path / "package").path).tobytes() == logits(visual_package).tobytes()


def test_without_a_preprocessor(visual_checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    shutil.copytree(visual_checkpoint, source)
    for file in (source / "base").glob("*preprocessor_config.json"):
        file.unlink()
    with Engine.open(build(source, tmp_path / "package").path, threads=1) as engine:
        session = engine.session()
        session.step([1])
        with pytest.raises(PackageError, match=r"has no preprocessor_config.json, so it cannot take images"):
            session.prefill([IMAGE], [picture(64, 64)])
        assert session.tokens_seen == 1


@pytest.mark.parametrize(("limit", "tokens"), [(1, 1), (7, 4), (79, 63), (80, 80), (300, 80)])
def test_the_limit_on_an_image_is_the_builds(visual_checkpoint: Path, tmp_path: Path, limit: int, tokens: int) -> None:
    report = build(visual_checkpoint, tmp_path / "package", max_image_tokens=limit)
    assert report.config.vision is not None
    assert report.config.vision.max_image_tokens == limit
    with Engine.open(report.path, threads=1) as engine, engine.session() as session:
        session.prefill([IMAGE], [picture(256, 320)])
        assert session.tokens_seen == tokens


@pytest.mark.parametrize("limit", [0, -1, 65537, 1.5, True, "many"])
def test_bad_limits(visual_checkpoint: Path, tmp_path: Path, limit: Any) -> None:
    with pytest.raises(OptionError, match=f"max-image-tokens must be a whole number from 1 to 65536, got {limit!r}"):
        build(visual_checkpoint, tmp_path / "package", max_image_tokens=limit)


def test_a_text_package_has_no_vision(package: Path) -> None:
    config = Package.open(package).config
    assert config.vision is None
    assert not list(package.glob("vision*"))
    assert json.loads((package / "memory_plan.json").read_text())["vision_weight_bytes"] == 0


def test_the_vision_tower_of_another_build(visual_checkpoint: Path, visual_package: Path, tmp_path: Path) -> None:
    damaged = copy_package(visual_package, tmp_path / "damaged")
    other = build(visual_checkpoint, tmp_path / "other", max_image_tokens=79, budget=9).path
    shutil.copy(other / "vision.onnx", damaged / "vision.onnx")
    seal(damaged)
    with pytest.raises(PackageError, match=r"vision\.onnx says 9; they are of different builds"):
        Engine.open(damaged)
    Engine.open(damaged, vision=False).close()
