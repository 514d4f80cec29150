import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from trimkv_export.checkpoint.backbone import open_backbone
from trimkv_export.errors import CheckpointError


def config(folder: Path, content: Any = None) -> Path:
    text = content if isinstance(content, str) else json.dumps(content or {"model_type": "qwen3"})
    (folder / "config.json").write_text(text)
    return folder


def weights(folder: Path, file: str, *names: str) -> None:
    save_file({name: np.full(2, 1.0, np.float32) for name in names}, folder / file)


def index(folder: Path, content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "model.safetensors.index.json").write_text(text)


def test_single_file(tmp_path: Path) -> None:
    weights(config(tmp_path), "model.safetensors", "a", "b")
    weights(tmp_path, "other.safetensors", "z")
    found = open_backbone(tmp_path)
    assert set(found.tensors) == {"a", "b"}
    assert found.files == (tmp_path / "model.safetensors",)
    assert found.config == {"model_type": "qwen3"}
    assert found.path == tmp_path


def test_single_other_file_and_gates_beside_it(tmp_path: Path) -> None:
    weights(config(tmp_path), "consolidated.safetensors", "a")
    weights(tmp_path, "trimkv_weights.safetensors", "g")
    assert set(open_backbone(tmp_path).tensors) == {"a"}


def test_shards(tmp_path: Path) -> None:
    weights(config(tmp_path), "1.safetensors", "a", "b", "not in the index")
    weights(tmp_path, "2.safetensors", "c")
    weights(tmp_path, "3.safetensors", "a")  # not in the index
    index(tmp_path, {"weight_map": {"c": "2.safetensors", "a": "1.safetensors", "b": "1.safetensors"}})
    found = open_backbone(tmp_path)
    assert {name: info.file.name for name, info in found.tensors.items()} == {
        "a": "1.safetensors",
        "b": "1.safetensors",
        "c": "2.safetensors",
    }
    assert [file.name for file in found.files] == ["1.safetensors", "2.safetensors"]
    np.testing.assert_array_equal(found.tensors["c"].read(), np.ones(2, np.float32))


def test_without_weights(tmp_path: Path) -> None:
    found = open_backbone(config(tmp_path), weights=False)
    assert (found.tensors, found.files) == ({}, ())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is a JSON list, not an object"),
        ('{"model_type": 3}', "has the model_type 3"),
        ('{"hidden_size": 3}', "has the model_type None"),
    ],
)
def test_bad_config(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_backbone(config(tmp_path, content))


def test_missing_folder_and_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        open_backbone(tmp_path)
    with pytest.raises(CheckpointError, match=r"does not exist"):
        open_backbone(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"is a file, not a checkpoint folder"):
        open_backbone(config(tmp_path) / "config.json")
    (tmp_path / "folder" / "config.json").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"cannot be read"):
        open_backbone(tmp_path / "folder")


def test_no_usable_weights(tmp_path: Path) -> None:
    config(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no weights: expected model.safetensors"):
        open_backbone(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(
        CheckpointError, match=r"has 'pytorch_model.bin' and no safetensors weights: write them to another folder"
    ):
        open_backbone(tmp_path)
    weights(tmp_path, "x.safetensors", "a")
    weights(tmp_path, "y.safetensors", "b")
    with pytest.raises(CheckpointError, match=r"has 'x.safetensors', 'y.safetensors' and no model.safetensors.index"):
        open_backbone(tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"hold no tensor"):
        open_backbone(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ({"weight_map": []}, "has no 'weight_map'"),
        ({"weight_map": {}}, "has no 'weight_map'"),
        ({"weight_map": {"a": 3}}, "'a' lies in '3', which is no file name of weights"),
        ({"weight_map": {"a": "../1.safetensors"}}, "which is no file name of weights"),
        ({"weight_map": {"a": "9.safetensors"}}, "the shard '9.safetensors' .* is missing"),
        ({"weight_map": {"c": "1.safetensors"}}, "'1.safetensors' holds 'c', and it does not"),
        ({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}, "'b' is in both '1.safetensors' and '2.safe"),
    ],
)
def test_bad_index(tmp_path: Path, content: Any, message: str) -> None:
    weights(config(tmp_path), "1.safetensors", "a", "b")
    weights(tmp_path, "2.safetensors", "b")
    index(tmp_path, content)
    with pytest.raises(CheckpointError, match=message):
        open_backbone(tmp_path)
