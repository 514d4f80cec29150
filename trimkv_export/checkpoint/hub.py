"""Download a repository from the Hugging Face hub into its local cache; the only file that reaches the network."""

import errno
from collections.abc import Sequence
from pathlib import Path

from trimkv_export.errors import DownloadError, OutputError, TrimKVError, missing
from trimkv_export.words import first_line

__all__ = ["BACKBONE_FILES", "COMPANION_FILES", "CONFIG_FILES", "GATES_FILES", "download"]

# Some say that a checkpoint is quantised, or that an adapter lies with it, where config.json does not.
CONFIG_FILES = ("config.json", "quantize_config.json", "quant_config.json", "adapter_config.json")
GATES_FILES = ("config.json", "trimkv_weights.*")
# What lies with the weights: tokenizer, templates, processors.
COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "*preprocessor_config.json",
    "processor_config.json",
)
BACKBONE_FILES = (*CONFIG_FILES, "*.safetensors", "*.safetensors.index.json", *COMPANION_FILES)

WRITE_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "no permission to write",
    errno.EPERM: "no permission to write",
    errno.EROFS: "the file system is read-only",
}


def download(repo_id: str, files: Sequence[str], *, revision: str | None = None) -> Path:
    """Fetch files of a repository, and return their folder in the hub's cache.

    Progress bars, resuming, the cache, proxies and the access token are the hub client's own.

    Args:
        repo_id: owner/name.
        files: patterns of their names.
        revision: branch, tag or commit; None is the newest.

    Raises:
        MissingDependencyError: huggingface_hub is not installed.
        DownloadError: no such repository or revision, no access, or no connection.
        OutputError: the cache cannot be written.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise missing(f"fetching {repo_id!r}", "huggingface_hub", "export") from error
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=list(files)))
    except Exception as error:  # the client's HTTP library, and so its errors, differ between versions
        raise _explain(error, repo_id, revision) from error


def _explain(error: Exception, repo_id: str, revision: str | None) -> TrimKVError:
    """The error that says what went wrong and what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, errors.HfHubHTTPError):
        error = error.__cause__  # not in the cache, because the hub answered with this
    if isinstance(error, errors.GatedRepoError):
        return DownloadError(
            f"{repo_id!r} is open only to those who have accepted its terms: accept them at "
            f"https://huggingface.co/{repo_id}, then run `hf auth login`"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return DownloadError(
            f"{repo_id!r} is neither a folder here nor a repository on the hub (or a private one): check the spelling, "
            "or run `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return DownloadError(f"{repo_id!r} has no revision {revision!r}: name a branch, tag or commit it has")
    if isinstance(error, errors.HFValidationError):
        return DownloadError(f"{repo_id!r} is not a name that the hub allows: expected owner/name")
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return DownloadError(
            f"{repo_id!r} is not in the local cache and the hub cannot be reached: check the connection (and "
            "HF_HUB_OFFLINE), or name a folder"
        )
    if isinstance(error, errors.HfHubHTTPError):
        status = getattr(getattr(error, "response", None), "status_code", "unknown")
        return DownloadError(
            f"the hub answered {repo_id!r} with HTTP status {status}: try again later; what was fetched is kept"
        )
    if isinstance(error, OSError) and error.errno in WRITE_ERRORS:
        where = f" ({error.filename})" if error.filename else ""
        return OutputError(
            f"{repo_id!r} cannot be written to the hub's cache: {WRITE_ERRORS[error.errno]}{where}: free it, or set "
            "HF_HOME to another folder"
        )
    return DownloadError(
        f"fetching {repo_id!r} failed ({first_line(error)}): check the connection and run it again; what was fetched "
        "is kept"
    )
