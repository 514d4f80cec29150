import builtins
import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from trimkv_export.checkpoint.hub import BACKBONE_FILES, GATES_FILES, download
from trimkv_export.errors import DownloadError, MissingDependencyError, OutputError, TrimKVError


def hub_error(kind: Any, status: int = 0, cause: Exception | None = None) -> Exception:
    """Make a hub error as every version of the client has it; their constructors differ."""
    error: Exception = kind.__new__(kind)
    error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    error.__cause__ = cause
    return error


def test_asks_for_the_files_and_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []

    def fake(repo_id: str, **options: Any) -> str:
        calls.append((repo_id, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    assert download("a/b", GATES_FILES, revision="v1") == tmp_path
    assert calls == [("a/b", {"revision": "v1", "allow_patterns": ["config.json", "trimkv_weights.*"]})]
    wanted = huggingface_hub.utils.filter_repo_objects(
        ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "README.md",
         "chat_template.jinja", "tokenizer.json", "config.json"],
        allow_patterns=list(BACKBONE_FILES),
    )  # fmt: skip
    assert not {"pytorch_model.bin", "README.md"} & (names := set(wanted))
    assert len(names) == 5


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (hub_error(errors.RepositoryNotFoundError, 404), DownloadError, "neither a folder here nor a repository"),
        (hub_error(errors.GatedRepoError, 403), DownloadError, r"accept them at https://huggingface.co/a/b, then run"),
        (hub_error(errors.RevisionNotFoundError, 404), DownloadError, "has no revision 'v9'"),
        (errors.HFValidationError("bad"), DownloadError, "not a name that the hub allows"),
        (hub_error(errors.LocalEntryNotFoundError), DownloadError, "not in the local cache and the hub cannot"),
        (errors.OfflineModeIsEnabled("off"), DownloadError, "HF_HUB_OFFLINE"),
        (hub_error(errors.HfHubHTTPError, 503), DownloadError, "with HTTP status 503: try again later"),
        (
            hub_error(errors.LocalEntryNotFoundError, cause=hub_error(errors.HfHubHTTPError, 500)),
            DownloadError,
            "HTTP status 500",
        ),
        (OSError(errno.ENOSPC, "No space left"), OutputError, "the disk is full: free it"),
        (PermissionError(errno.EACCES, "denied", "/cache/x"), OutputError, r"no permission to write \(/cache/x\)"),
        (ConnectionError("reset by peer\nmore"), DownloadError, r"failed \(reset by peer\): check the connection"),
        (RuntimeError(), DownloadError, r"failed \(RuntimeError\)"),
    ],
)
def test_errors_are_explained(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[TrimKVError], message: str
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(kind, match=message) as caught:
        download("a/b", GATES_FILES, revision="v9")
    assert "'a/b'" in str(caught.value)
    assert caught.type is kind


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "huggingface_hub":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r"pip install 'trimkv-export\[export\]'"):
        download("a/b", GATES_FILES)
