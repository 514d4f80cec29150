import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from trimkv_export.checkpoint import locate as locate_module_function
from trimkv_export.checkpoint import shipped
from trimkv_export.checkpoint.hub import BACKBONE_FILES, COMPANION_FILES, CONFIG_FILES, GATES_FILES
from trimkv_export.checkpoint.locate import Location, locate, locate_backbone
from trimkv_export.errors import CheckpointError, OptionError

Calls = list[tuple[str, Sequence[str], str | None]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    """Stand in for the hub: `o/gates` are gates of `o/base`, `o/lost` name no backbone, all else is a backbone."""
    calls: Calls = []

    def download(repo_id: str, files: Sequence[str], *, revision: str | None = None) -> Path:
        calls.append((repo_id, files, revision))
        folder = tmp_path / "hub" / repo_id.replace("/", "--")
        gates_of = {"o/gates": {"base_model": "o/base"}, "o/lost": {}}
        folder.mkdir(parents=True, exist_ok=True)
        config = {"model_type": "qwen3"} if repo_id not in gates_of else gates_of[repo_id] | {"retention_gate": "rg"}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    # By sys.modules: the package attribute `locate` is the function of that name.
    monkeypatch.setattr(sys.modules[locate.__module__], "download", download)
    monkeypatch.chdir(tmp_path)
    return calls


def folder(path: Path, config: dict[str, str]) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


def gates_folder(path: Path, base_model: str) -> Path:
    return folder(path, {"base_model": base_model, "retention_gate": "rg"})


def test_alias(hub: Calls) -> None:
    found = locate("qwen3-4b")
    assert (found.backbone_id, found.gates_id) == ("Qwen/Qwen3-4B", "ngocbh/DBTrimKV-Qwen3-4B-Math")
    assert (found.backbone.name, found.gates.name) == ("Qwen--Qwen3-4B", "ngocbh--DBTrimKV-Qwen3-4B-Math")
    assert hub == [
        ("ngocbh/DBTrimKV-Qwen3-4B-Math", GATES_FILES, None),
        ("Qwen/Qwen3-4B", BACKBONE_FILES, None),
    ]


def test_all_but_weights(hub: Calls) -> None:
    locate("qwen3-4b", weights=False)
    assert hub == [
        ("ngocbh/DBTrimKV-Qwen3-4B-Math", GATES_FILES, None),
        ("Qwen/Qwen3-4B", (*CONFIG_FILES, *COMPANION_FILES), None),
    ]


def test_alias_with_other_gates(hub: Calls) -> None:
    assert locate("qwen3-4b", "o/gates").gates_id == "o/gates"
    found = locate("o/other", "qwen3-4b-trimkv")
    assert (found.backbone_id, found.gates_id) == ("o/other", "ngocbh/TrimKV-Qwen3-4B-Math")


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The gates of smollm2-135m, in a folder of the test."""
    monkeypatch.setattr(shipped, "FOLDERS", (tmp_path / "nowhere", tmp_path / "tree"))
    return gates_folder(tmp_path / "tree/examples/smollm2/gates", SMOLLM2)


SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("named", ["alias", "gates"])
def test_gates_of_this_program(named: str, hub: Calls, bundled: Path) -> None:
    """Their backbone is that which lies next to them, or else the hub's."""
    model = {"alias": "SmolLM2-135M", "gates": str(bundled)}[named]
    assert locate(model) == Location(hub_folder(SMOLLM2), bundled, SMOLLM2, None)
    assert hub == [(SMOLLM2, BACKBONE_FILES, None)]
    hub.clear()
    fetched = folder(bundled.parent / SMOLLM2, {"model_type": "llama"})
    assert locate(model) == Location(fetched, bundled, None, None)
    assert locate("o/other", "smollm2-135m").gates == bundled
    assert locate("smollm2-135m", "o/gates").backbone == fetched
    assert locate_backbone("smollm2-135m") == (fetched, None)
    assert [call[0] for call in hub] == ["o/other", "o/gates"]
    with pytest.raises(OptionError, match="revision 'v2' needs a hub id"):
        locate("smollm2-135m", revision="v2")


def hub_folder(repo_id: str) -> Path:
    return Path.cwd() / "hub" / repo_id.replace("/", "--")


def test_a_backbone_alone(hub: Calls, tmp_path: Path) -> None:
    local = folder(tmp_path / "local", {"model_type": "qwen3"})
    assert locate_backbone(str(local)) == (local, None)
    assert locate_backbone("qwen3-4b") == (hub_folder("Qwen/Qwen3-4B"), "Qwen/Qwen3-4B")
    assert hub == [("Qwen/Qwen3-4B", BACKBONE_FILES, None)]
    with pytest.raises(CheckpointError, match="the model 'gpt' is neither a folder"):
        locate_backbone("gpt")


def test_folders(hub: Calls, tmp_path: Path) -> None:
    base, gates = folder(tmp_path / "b", {"model_type": "qwen3"}), gates_folder(tmp_path / "g", "")
    assert locate(str(base), str(gates)) == Location(base, gates, None, None)
    assert hub == []


def test_an_existing_folder_wins_over_an_alias_and_a_hub_id(hub: Calls, tmp_path: Path) -> None:
    folder(tmp_path / "qwen3-4b", {"model_type": "qwen3"})
    gates_folder(tmp_path / "o" / "gates", "o/base")
    assert locate("qwen3-4b", "o/gates") == Location(Path("qwen3-4b"), Path("o/gates"), None, None)


def test_hub_gates_name_their_backbone(hub: Calls) -> None:
    found = locate("o/gates", revision="v2")
    assert (found.backbone_id, found.gates_id) == ("o/base", "o/gates")
    assert hub == [("o/gates", GATES_FILES, "v2"), ("o/base", BACKBONE_FILES, None)]


def test_revision_is_of_the_model(hub: Calls, tmp_path: Path) -> None:
    locate("o/base", "o/gates", revision="v2")
    assert hub == [("o/gates", GATES_FILES, None), ("o/base", BACKBONE_FILES, "v2")]
    for model in ("qwen3-4b", str(tmp_path)):
        with pytest.raises(OptionError, match=r"revision 'v2' needs a hub id"):
            locate(model, revision="v2")


@pytest.mark.parametrize("place", ["gates/base", "base"])
def test_local_gates_name_a_folder(hub: Calls, tmp_path: Path, place: str) -> None:
    gates = gates_folder(tmp_path / "gates", "base")
    base = folder(tmp_path / place, {"model_type": "qwen3"})
    assert locate(str(gates)) == Location(base, gates, None, None)


def test_gates_in_the_current_folder(hub: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(gates_folder(tmp_path / "gates", "base"))
    base = folder(tmp_path / "base", {"model_type": "qwen3"})
    assert locate(".").backbone == base


def test_local_gates_name_a_hub_id_or_an_absolute_folder(hub: Calls, tmp_path: Path) -> None:
    assert locate(str(gates_folder(tmp_path / "g1", "o/base"))).backbone_id == "o/base"
    base = folder(tmp_path / "b", {"model_type": "qwen3"})
    assert locate(str(gates_folder(tmp_path / "g2", str(base)))).backbone == base


@pytest.mark.parametrize("base_model", ["nowhere", "x" * 5000, "/no/such/folder", "a\0b"])
def test_backbone_of_the_gates_is_not_there(hub: Calls, tmp_path: Path, base_model: str) -> None:
    with pytest.raises(CheckpointError, match=r"neither a folder next to them nor a hub id"):
        locate(str(gates_folder(tmp_path / "g", base_model)))


def test_gates_without_base_model(hub: Calls) -> None:
    with pytest.raises(CheckpointError, match=r"'o/lost' have no base_model in config.json: name the backbone with"):
        locate("o/lost")


def test_backbone_without_gates_is_refused_before_its_weights_are_fetched(hub: Calls, tmp_path: Path) -> None:
    for model in ("o/base", str(folder(tmp_path / "b", {"model_type": "qwen3"}))):
        with pytest.raises(CheckpointError, match=r"holds no gates: .* --gates"):
            locate(model)
    assert hub == [("o/base", GATES_FILES, None)]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("qwen3-vl-4", "did you mean 'qwen3-vl-4b'"),
        ("Qwen-3-4b", "did you mean 'qwen3-4b'"),
        ("gpt", "aliases are qwen3-1.7b"),
        ("", "alias"),
        ("./x/y", "alias"),
    ],
)
def test_names_of_no_form(hub: Calls, name: str, hint: str) -> None:
    with pytest.raises(CheckpointError, match=r"neither a folder, nor a hub id \(owner/name\), nor an alias") as caught:
        locate(name)
    assert hint in str(caught.value)
    with pytest.raises(CheckpointError, match=r"the gates "):
        locate("o/base", name)


@pytest.mark.parametrize(
    ("inner", "said"),
    [
        (["base", "rg"], r"is a folder of checkpoints \(base, rg\): name one of them"),
        (["a", "b", "c", "d", "e"], r"is a folder of checkpoints \(a, b, c, d, …\): name one of them"),
    ],
)
def test_a_folder_of_checkpoints(hub: Calls, tmp_path: Path, inner: list[str], said: str) -> None:
    for name in inner:
        folder(tmp_path / "all" / name, {"model_type": "qwen3"})
    base = str(tmp_path / "all" / inner[0])
    with pytest.raises(CheckpointError, match=f"the model '.*all' {said}"):
        locate(str(tmp_path / "all"))
    with pytest.raises(CheckpointError, match=f"the gates '.*all' {said}"):
        locate(base, str(tmp_path / "all"))
    assert hub == []


def test_exported() -> None:
    assert locate_module_function is locate


@pytest.mark.parametrize("name", ["owner/model.gguf", "models/model.safetensors"])
def test_a_file_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).touch()
    for model, gates, role in ((name, None, "model"), ("qwen3-4b", name, "gates")):
        with pytest.raises(CheckpointError, match=f"the {role} '{name}' is a file; name the folder that it lies in"):
            locate(model, gates)
