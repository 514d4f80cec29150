"""The files that lie with a model's weights: tokenizer, chat templates, processors. Read, resolved and checked.

What a checkpoint lacks is told, for a model runs without it; what it has and cannot be used is an error. Both come
before weights are read.
"""

from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trimkv_export.errors import CheckpointError, OptionError, PackageError, UnsupportedModelError
from trimkv_export.files import LFS_POINTER, read_regular
from trimkv_export.package import CompanionInfo, VisionInfo
from trimkv_export.text.chat import check_template
from trimkv_export.text.resolve import TEMPLATE_FOLDER, is_there, template_file
from trimkv_export.text.tokenizer import Tokenizer
from trimkv_export.vision.processor_config import PatchConfig
from trimkv_export.vision.reader import image_config, video_config
from trimkv_export.words import shorten

__all__ = ["COMPANIONS", "Companions", "checkpoint_companions", "resolve_companions"]

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
# Other layouts of a tokenizer, of which transformers makes a tokenizer.json.
OTHER_TOKENIZERS = ("tokenizer.model", "vocab.json", "tekken.json", "tiktoken.model")


@dataclass(frozen=True)
class Companions:
    """What was resolved.

    Attributes:
        info: for a package's config.json.
        notes: what cannot be done with what there is, a sentence each.
        templates: chat templates, name -> Jinja source.
    """

    info: CompanionInfo
    notes: tuple[str, ...]
    templates: Mapping[str, str]

    @property
    def words(self) -> str:
        """What there is, in words."""
        text = self.info.text
        found = {
            "tokenizer": text is not None,
            "chat template": bool(self.templates),
            "images": self.info.images is not None,
            "videos": self.info.videos is not None,
        }
        return ", ".join(name for name, there in found.items() if there) or "none"


def checkpoint_companions(
    folder: Path, vocab_size: int, vision: VisionInfo | None
) -> tuple[Companions, dict[str, bytes]]:
    """Read and resolve the companions of a checkpoint.

    Args:
        folder: the backbone's.
        vocab_size: tokens of the model.
        vision: the vision tower; None if there is none.

    Returns:
        What was resolved, and the content of the package's files by name: the checkpoint's, and each chat template in
        a file of its own, where transformers and this package look first.

    Raises:
        CheckpointError: a file cannot be read, leads out of the checkpoint, or is of another model.
        UnsupportedModelError: the image processor is one that this version does not know.
    """
    files = _read_files(folder)
    try:
        found = resolve_companions(folder, None, vocab_size, vision)
    except PackageError as error:
        raise CheckpointError(str(error)) from None
    return found, files | {template_file(name): text.encode() for name, text in found.templates.items()}


def resolve_companions(
    folder: Path,
    listed: Container[str] | None,
    vocab_size: int,
    vision: VisionInfo | None,
    info: CompanionInfo | None = None,
) -> Companions:
    """Resolve the companions that lie in a folder, a checkpoint or a package.

    Args:
        folder: see above.
        listed: names of the files that may be read; None means all.
        vocab_size: tokens of the model.
        vision: the vision tower; None if there is none.
        info: what `build` resolved; None resolves text anew.

    Raises:
        PackageError: a file is corrupt, or of another model.
        UnsupportedModelError: the image processor is one that this version does not know.
        MissingDependencyError: tokenizers is not installed.
    """
    notes: list[str] = []
    tokenizer = _open_tokenizer(folder, listed, info, notes)
    if tokenizer is not None:
        _check_text(folder, tokenizer, vocab_size, vision, notes)
    images = videos = None
    if vision is not None:
        images, videos = _processors(folder, listed, vision, notes)
    return Companions(
        CompanionInfo(None if tokenizer is None else tokenizer.info, images, videos),
        tuple(notes),
        {} if tokenizer is None else tokenizer.chat_templates,
    )


def _read_files(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint that enter a package as they are, by name.

    A link may point to where the hub's cache keeps the files of this very repository; one to another place would carry
    a file into the package that is no part of the checkpoint.

    Raises:
        CheckpointError: one cannot be read, is no ordinary file, or is a symbolic link out of the checkpoint.
    """
    here, found = folder.resolve(), {}
    homes = [here, here.parents[1] / "blobs"] if here.parent.name == "snapshots" else [here]
    templates = sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))
    for file in (*(folder / name for name in COMPANIONS), *templates):
        try:
            if not file.is_symlink() and not file.exists():
                continue
            target = file.resolve()
            if not any(target.is_relative_to(home) for home in homes):
                raise CheckpointError(
                    f"{file}: is a symbolic link out of the checkpoint, to {target}; put a copy of the file there"
                )
            content = read_regular(file)
        except (OSError, RuntimeError) as error:  # RuntimeError: a link to itself
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"{file}: cannot be read ({reason}): check its permissions") from None
        if content.startswith(LFS_POINTER):
            raise CheckpointError(f"{file}: is a pointer of Git LFS, not the file: run `git lfs pull` in its folder")
        found[file.relative_to(folder).as_posix()] = content
    return found


def _open_tokenizer(
    folder: Path, listed: Container[str] | None, info: CompanionInfo | None, notes: list[str]
) -> Tokenizer | None:
    """The tokenizer; None where there is no tokenizer.json."""
    name = "tokenizer.json"
    if is_there(folder / name, listed):
        return Tokenizer.open(folder, listed, info.text if info else None)
    others = [other for other in OTHER_TOKENIZERS if is_there(folder / other, listed)]
    make = (
        f"; make it of {others[0]} with transformers' AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        if others
        else ""
    )
    notes.append(f"{folder} has no {name}, so the package reads and writes token ids only, no text{make}")
    return None


def _check_text(
    folder: Path, tokenizer: Tokenizer, vocab_size: int, vision: VisionInfo | None, notes: list[str]
) -> None:
    """Note what a tokenizer lacks. Raises PackageError where it is of another model."""
    beyond, special = tokenizer.ids_from(vocab_size), set(tokenizer.special_tokens.values())
    unused = tokenizer.added_tokens() - special  # as for padding, which no prompt has
    if own := {text: number for text, number in beyond.items() if text not in unused}:
        text, number = max(own.items(), key=lambda token: token[1])
        raise PackageError(
            f"{folder / 'tokenizer.json'}: has the token {shorten(text)} of id {number}, and the model's ids end at "
            f"{vocab_size - 1}; they are of different models"
        )
    if beyond:
        text, number = min(beyond.items(), key=lambda token: token[1])
        notes.append(
            f"the tokenizer has {len(beyond)} added token{'' if len(beyond) == 1 else 's'} beyond the model's "
            f"{vocab_size:,}, such as {shorten(text)} of id {number}; a prompt with one is refused"
        )
    if wrong := [number for number in tokenizer.info.eos_token_ids if number >= vocab_size]:
        raise PackageError(
            f"{folder}: eos_token_id {wrong[0]} is no token of the model, whose ids end at {vocab_size - 1}; mend it "
            "in generation_config.json or config.json"
        )
    for name, text in sorted(tokenizer.special_tokens.items()):
        if name in ("bos_token", "eos_token") and not tokenizer.knows(text):
            notes.append(f"the {name} {shorten(text)} is not in tokenizer.json, and stays text")
    if not tokenizer.eos_ids:
        notes.append("no file names an eos_token_id, so answers end at --max-new-tokens alone")
    if tokenizer.chat_template is None:
        others = f" by the name 'default', only {', '.join(tokenizer.chat_templates)}" * bool(tokenizer.chat_templates)
        notes.append(f"there is no chat template{others}, so --chat cannot be used")
    for name, template in tokenizer.chat_templates.items():
        try:
            check_template(template)
        except OptionError as error:
            notes.append(f"{error} ({template_file(name)}); conversations that take it are refused")
    if vision is not None:
        for token in (vision.image_token_id, vision.video_token_id):
            if token is not None and not tokenizer.decode([token], skip_special_tokens=False):
                notes.append(f"the tokenizer has no token {token}, which stands for a picture: prompts cannot have any")


def _processors(
    folder: Path, listed: Container[str] | None, vision: VisionInfo, notes: list[str]
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """How images and videos are processed. Images alone decide whether a model can be built."""
    if not PatchConfig.is_in(folder, listed):
        notes.append(f"{folder} has no {PatchConfig.FILES[0]}, so the package takes no pictures")
        return None, None
    images = asdict(image_config(folder, vision, listed))
    try:
        videos = video_config(folder, vision, listed)
    except (PackageError, UnsupportedModelError) as error:
        notes.append(f"the package takes no videos: {error}")
        videos = None
    return images, None if videos is None else asdict(videos)
