"""Checkpoints of strangers: what may enter a package, and what a build may write to."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import build, make_checkpoint

from trimkv_export.config import PlanOptions
from trimkv_export.errors import CheckpointError, UnsupportedModelError
from trimkv_export.package import Package
from trimkv_export.plan.planner import plan_model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "checkpoint")


@pytest.mark.parametrize(
    "shard", ["decoder.onnx", "config.json", "../model.safetensors", ".safetensors", "a\\b.safetensors"]
)
def test_a_shard_by_the_name_of_another_file(source: Path, tmp_path: Path, shard: str) -> None:
    """With --weights link the build would write its graph through the link into the checkpoint."""
    base = source / "base"
    weights = (base / "model.safetensors").rename(base / "decoder.onnx")
    before = weights.read_bytes()
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(CheckpointError, match="no file name of weights"):
        build(source, tmp_path / "package", weights="link")
    assert weights.read_bytes() == before


def test_companions_that_lead_out_of_the_checkpoint(source: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("private")
    (source / "base" / "chat_template.jinja").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"chat_template.jinja: is a symbolic link out of the checkpoint"):
        build(source, tmp_path / "package")
    assert not (tmp_path / "package").exists()


def test_links_within_the_checkpoint_and_the_hubs_cache(source: Path, tmp_path: Path) -> None:
    (source / "base" / "inner").mkdir()
    for name, home in (
        ("tokenizer.json", source / "base" / "inner"),
        ("generation_config.json", tmp_path / "r" / "blobs"),
    ):
        home.mkdir(parents=True, exist_ok=True)
        (home / "blob").write_bytes((source / "base" / name).read_bytes())
    snapshot = tmp_path / "r" / "snapshots" / "0123"
    snapshot.parent.mkdir()
    (source / "base").rename(snapshot)
    (source / "base").symlink_to(snapshot)
    for name, target in (("tokenizer.json", "inner/blob"), ("generation_config.json", "../../blobs/blob")):
        (snapshot / name).unlink()
        (snapshot / name).symlink_to(target)
    files = Package.open(build(source, tmp_path / "package").path).config.files
    assert {"tokenizer.json", "generation_config.json"} <= set(files)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_a_tokenizer_that_cannot_be_read(source: Path, tmp_path: Path, make: Callable[[Path], None]) -> None:
    """It is the checkpoint's fault, not the output's."""
    (source / "base" / "tokenizer.json").unlink()
    make(source / "base" / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"base/tokenizer\.json: cannot be read"):
        build(source, tmp_path / "package")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_hidden_layers": 10**6}, "num_hidden_layers 1000000 is not supported; supported: at most 128"),
        ({"head_dim": 10**9}, "head_dim 1000000000 is not supported; supported: at most 256"),
        (
            {"model_type": "llama", "head_dim": None, "hidden_size": 4096, "num_attention_heads": 4},
            "is a head_dim of 1024",
        ),
        ({"hidden_size": 2**30}, "hidden_size 1073741824 is not supported"),
        ({"vocab_size": 2**30}, "vocab_size 1073741824 is not supported"),
        ({"num_key_value_heads": 10**5, "num_attention_heads": 10**5}, "is not supported; supported: at most 1,024"),
    ],
)
def test_hostile_sizes(source: Path, values: dict[str, Any], said: str) -> None:
    """Refused before anything of that size is made."""
    file = source / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(UnsupportedModelError, match=said):
        plan_model(PlanOptions(str(source / "base"), 8, gates=str(source / "gates")))
