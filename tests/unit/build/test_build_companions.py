"""What lies with the weights: resolved by `build`, told about before weights are read, and checked by `verify`."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from pictures import picture
from support import IMAGE, Cli, build, copy_package, seal

from trimkv_export.build.builder import build_package
from trimkv_export.config import BuildOptions
from trimkv_export.errors import CheckpointError, PackageError, TrimKVError, UnsupportedModelError
from trimkv_export.package import Package
from trimkv_export.runtime import Engine
from trimkv_export.runtime.prompts import encode_prompt
from trimkv_export.verify import check_package

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
IM_END = 258


def edited(source: Path, target: Path, **changes: Any) -> Path:
    """A copy of a checkpoint. File (with _ for the last dot) -> keys that change, a text, or None: no such file."""
    shutil.copytree(source, target)
    for name, change in changes.items():
        file = target / "base" / ".".join(name.replace("__", "/").rsplit("_", 1))
        file.parent.mkdir(exist_ok=True)
        if change is None:
            file.unlink()
        elif isinstance(change, str):
            file.write_text(change)
        else:
            before = json.loads(file.read_text()) if file.exists() else {}
            content = {key: value for key, value in (before | change).items() if value is not ...}
            file.write_text(json.dumps(content))
    return target


def without_weights(source: Path) -> Path:
    """So that whatever is said was said before they are read."""
    (source / "base" / "model.safetensors").unlink()
    return source


def told(source: Path, target: Path) -> list[str]:
    """What a build says of what is missing, before it finds that the weights are."""
    found: list[str] = []
    options = BuildOptions(
        model=str(without_weights(source) / "base"), gates=str(source / "gates"), output=target, budget=8
    )
    with pytest.raises(CheckpointError, match="has no weights"):
        build_package(options, tell=found.append)
    return found


def test_an_end_of_text_in_config_json_alone(checkpoint: Path, tmp_path: Path) -> None:
    """It is in no file of a package; without it an answer would never end."""
    token = {"eos_token": ..., "tokenizer_class": ...}  # so the class is the family's
    source = edited(checkpoint, tmp_path / "source", generation_config_json=None, tokenizer_config_json=token)
    package = build(source, tmp_path / "package").path
    with Engine.open(package) as engine:
        assert engine.tokenizer.eos_ids == {IM_END, 256}  # of config.json, and of Qwen's class
    assert check_package(package).passed


def test_templates_become_files_of_the_package(visual_checkpoint: Path, tmp_path: Path) -> None:
    """A model that sees takes chat_template.json, and not the text template of its tokenizer."""
    source = edited(
        visual_checkpoint,
        tmp_path / "source",
        chat_template_json={"chat_template": "seen {{ messages[0].content[0].text }}"},
        additional_chat_templates__tool_use_jinja="tools",
    )
    package = build(source, tmp_path / "package").path
    assert (package / "chat_template.jinja").read_text().startswith("seen")
    assert (package / "additional_chat_templates" / "tool_use.jinja").read_text() == "tools"
    said = Package.open(package).config.companions
    assert said is not None
    assert said.text is not None
    assert said.text.chat_templates == ["default", "tool_use"]
    assert said.images is not None
    assert said.images["patch_size"] == 16
    with Engine.open(package, vision=False) as engine:
        text = engine.tokenizer.decode(encode_prompt(engine, "x", chat=True).tokens)
        assert text == "seen x"
        assert engine.tokenizer.render_chat([], tools=[]) == "tools"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenizer_json": None}, "has no tokenizer.json, so the package reads and writes token ids only"),
        ({"tokenizer_json": None, "tokenizer_model": "x"}, "make it of tokenizer.model with transformers"),
        ({"tokenizer_config_json": {"chat_template": ...}}, "there is no chat template, so --chat cannot be used"),
        ({"tokenizer_config_json": {"chat_template": {"rag": "R"}}}, "by the name 'default', only rag"),
        ({"tokenizer_config_json": {"chat_template": "{% if %}"}}, "the chat template is not valid"),
        ({"tokenizer_config_json": {"bos_token": "<|none|>"}}, "the bos_token '<|none|>' is not in tokenizer.json"),
        (
            {"generation_config_json": None, "config_json": {"eos_token_id": None},
             "tokenizer_config_json": {"eos_token": None}},
            "no file names an eos_token_id",
        ),
        ({"added_tokens_json": {"<late>": 259}}, "1 added token beyond the model's 259, such as '<late>' of id 259"),
    ],
)  # fmt: skip
def test_what_is_missing_is_told(checkpoint: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    found = told(edited(checkpoint, tmp_path / "source", **changes), tmp_path / "package")
    assert len(found) == 1
    assert said in found[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"preprocessor_config_json": None, "video_preprocessor_config_json": None}, "the package takes no pictures"),
        ({"video_preprocessor_config_json": {"patch_size": 14}}, "the package takes no videos: .* different models"),
        ({"video_preprocessor_config_json": {"video_processor_type": "Other"}}, "takes no videos: .*'Other' is not"),
    ],
)
def test_what_is_missing_of_pictures(
    visual_checkpoint: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    (found,) = told(edited(visual_checkpoint, tmp_path / "source", **changes), tmp_path / "package")
    assert re.search(said, found)


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"tokenizer_json": POINTER}, CheckpointError, r"tokenizer\.json: is a pointer of Git LFS.*git lfs pull"),
        ({"generation_config_json": POINTER}, CheckpointError, "is a pointer of Git LFS"),
        ({"tokenizer_json": "{}"}, CheckpointError, "is not a tokenizer that can be read"),
        ({"config_json": {"vocab_size": 200}}, CheckpointError, "of id 258, and the model's ids end at 199"),
        ({"config_json": {"eos_token_id": -1}}, CheckpointError, "eos_token_id must be token ids, got -1"),
        ({"generation_config_json": {"eos_token_id": 259}}, CheckpointError, "eos_token_id 259 is no token"),
        ({"tokenizer_config_json": "{"}, CheckpointError, "is not JSON"),
    ],
)
def test_what_cannot_be_used_is_refused(
    checkpoint: Path, tmp_path: Path, changes: dict[str, Any], kind: type[TrimKVError], said: str
) -> None:
    source = without_weights(edited(checkpoint, tmp_path / "source", **changes))
    with pytest.raises(kind, match=said):
        build(source, tmp_path / "package")
    assert not (tmp_path / "package").exists()


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"patch_size": 14}, CheckpointError, r"sizes are \(14, 2, 2\), the vision tower's \(16, 2, 2\)"),
        ({"image_processor_type": "SiglipImageProcessor"}, UnsupportedModelError, "'SiglipImageProcessor' is not"),
        ({"image_mean": 1}, CheckpointError, "image_mean must be three numbers"),
    ],
)
def test_a_processor_of_another_model(
    visual_checkpoint: Path, tmp_path: Path, changes: dict[str, Any], kind: type[TrimKVError], said: str
) -> None:
    source = without_weights(edited(visual_checkpoint, tmp_path / "source", preprocessor_config_json=changes))
    with pytest.raises(kind, match=said):
        build(source, tmp_path / "package")


def test_the_command_line_tells(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    source = edited(checkpoint, tmp_path / "source", tokenizer_json=None)
    package = tmp_path / "package"
    done = cli("build", "--model", source / "base", "--gates", source / "gates", "--budget", 8, "--output", package)
    assert done.code == 0
    assert "note: " in done.err
    assert "has no tokenizer.json" in done.err
    done = cli("verify", package, "--json")
    assert done.code == 0
    report = json.loads(done.out)
    assert report["companions"] == "none"
    assert "has no tokenizer.json" in report["notes"][0]


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("tokenizer_config.json", {"eos_token": "<|endoftext|>"}, "of special tokens the files say"),
        ("generation_config.json", {"eos_token_id": 3}, r"of eos_token_id the files say \[3\], and config.json \[\]"),
        ("generation_config.json", {"eos_token_id": -1}, "eos_token_id must be token ids"),
        ("tokenizer.json", POINTER, "pointer of Git LFS"),
    ],
)
def test_verify_finds_what_build_did_not_write(
    package: Path, tmp_path: Path, file: str, change: Any, said: str
) -> None:
    changed = copy_package(package, tmp_path / "changed")
    old = json.loads((changed / file).read_text()) if isinstance(change, dict) else None
    (changed / file).write_text(change if old is None else json.dumps(old | change))
    seal(changed)
    with pytest.raises(PackageError, match=said):
        check_package(changed)


def test_verify_finds_a_processor_of_another_model(visual_package: Path, tmp_path: Path) -> None:
    changed = copy_package(visual_package, tmp_path / "changed")
    file = changed / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"patch_size": 14}))
    seal(changed)
    with pytest.raises(PackageError, match="they are of different models"):
        check_package(changed)
    with Engine.open(changed, threads=1) as engine, pytest.raises(PackageError, match="different models"):
        engine.session().prefill([IMAGE], [picture(64, 64)])


def test_a_package_of_an_earlier_format(package: Path, tmp_path: Path) -> None:
    """Its files say what they say."""
    older = copy_package(package, tmp_path / "older")
    body = json.loads((older / "config.json").read_text())
    with Engine.open(older) as engine:
        wanted = engine.tokenizer.info
    del body["companions"], body["files"]["chat_template.jinja"]
    (older / "chat_template.jinja").unlink()
    (older / "config.json").write_text(json.dumps(body))
    seal(older, {"format_version": "2.4"})
    assert Package.open(older).config.companions is None
    with Engine.open(older) as engine:
        assert engine.tokenizer.info == wanted
    assert check_package(older).companions == "tokenizer, chat template"
