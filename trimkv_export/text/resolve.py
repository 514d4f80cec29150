"""What the files of a folder say about special tokens and chat templates, as Hugging Face transformers 4.57 reads them.

That is the version of the official code. Where 5.x differs, it is said at the place. In order of preference:

- *Special tokens:* special_tokens_map.json where tokenizer_config.json has no `added_tokens_decoder`, then
  tokenizer_config.json, then what the tokenizer's class has of its own, as far as the vocabulary knows it.
- *Tokens beyond tokenizer.json:* `added_tokens_decoder`, or added_tokens.json where there is none.
- *What begins and ends a text:* for Llama's class `add_bos_token` and `add_eos_token`, whatever tokenizer.json says
  (5.x follows tokenizer.json); for all others tokenizer.json.
- *Chat templates:* of models that see chat_template.json, which the processor reads, then chat_template.jinja, then
  tokenizer_config.json; of others chat_template.jinja, then tokenizer_config.json, then chat_template.json.
  Those of additional_chat_templates/ come to these by name.
- *What ends a generation:* all of generation_config.json, config.json and the tokenizer's own token.

`build` writes the result into a package's config.json, for a package holds neither the checkpoint's config.json nor
what follows from the order of files.
"""

import re
import stat
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimkv_export.checks import is_unicode
from trimkv_export.errors import PackageError
from trimkv_export.files import LFS_POINTER, read_json_object, read_text
from trimkv_export.words import amount, shorten

__all__ = [
    "DEFAULT",
    "TEMPLATE_FOLDER",
    "FolderText",
    "TextInfo",
    "is_there",
    "read_folder_text",
    "read_templates",
    "template_file",
]

# The largest tokenizer.json of a model, of 260,000 tokens, has 35 MB; templates have some ten kilobytes.
MOST_BYTES, MOST_TEMPLATE_CHARS, MOST_TEMPLATES = 256 << 20, 256 << 10, 64
DEFAULT, TEMPLATE_FOLDER = "default", "additional_chat_templates"
TEMPLATE_NAME = re.compile(r"\w[\w.-]{0,99}")
ADVICE = "fetch it again from where the model comes from"

_END_OF_TEXT = "<|endoftext|>"
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_QWEN = {"eos_token": _END_OF_TEXT, "unk_token": _END_OF_TEXT, "pad_token": _END_OF_TEXT}
_GPT2 = {"bos_token": _END_OF_TEXT, "eos_token": _END_OF_TEXT, "unk_token": _END_OF_TEXT}
# What a class of transformers has where the files name no token.
CLASS_TOKENS: Mapping[str, Mapping[str, str]] = {
    "LlamaTokenizer": _LLAMA, "CodeLlamaTokenizer": _LLAMA, "Qwen2Tokenizer": _QWEN, "GPT2Tokenizer": _GPT2,
}  # fmt: skip
# Whatever a model's own tokens are called, these are tokens.
TOKENS = frozenset({"bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"})
# Those that write their post-processor anew, and add the first token unless they are told not to.
LLAMA_CLASSES = frozenset({"LlamaTokenizer", "CodeLlamaTokenizer"})
# Where no file names a class.
CLASS_OF_FAMILY = {
    "llama": "LlamaTokenizer", "phi3": "LlamaTokenizer", "llava": "LlamaTokenizer", "qwen2": "Qwen2Tokenizer",
    "qwen2_5_vl": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer", "qwen3_vl": "Qwen2Tokenizer",
}  # fmt: skip


@dataclass(frozen=True)
class TextInfo:
    """What was resolved for one model, as a package's config.json has it.

    Attributes:
        special_tokens: bos_token, eos_token and the like -> text; what a chat template knows by these names.
        eos_token_ids: every id that ends a generation, ascending.
        add_bos_token: begin a text with bos_token; None: as tokenizer.json has it, and so is add_eos_token.
        add_eos_token: end a text with eos_token.
        chat_templates: their names; `template_file` says where each is.
    """

    special_tokens: Mapping[str, str]
    eos_token_ids: Sequence[int]
    add_bos_token: bool | None
    add_eos_token: bool | None
    chat_templates: Sequence[str]


@dataclass(frozen=True)
class FolderText:
    """What the files of a folder say; what depends on the vocabulary is left to the tokenizer.

    Attributes:
        special_tokens: those that the files name.
        class_tokens: those that the tokenizer's class has where the files are silent.
        added_tokens: to be added to tokenizer.json, as fields of `tokenizers.AddedToken`, in the order of their ids.
        add_bos_token: see `TextInfo`.
        add_eos_token: see `TextInfo`.
        eos_token_ids: of the configuration files.
        chat_templates: name -> Jinja source.
    """

    special_tokens: Mapping[str, str]
    class_tokens: Mapping[str, str]
    added_tokens: Sequence[Mapping[str, Any]]
    add_bos_token: bool | None
    add_eos_token: bool | None
    eos_token_ids: frozenset[int]
    chat_templates: Mapping[str, str]


def is_there(path: Path, listed: Container[str] | None, name: str | None = None) -> bool:
    """Whether there is such a file, and it may be read.

    Args:
        path: the file.
        listed: names of the files that may be read; None means all.
        name: the file's name in `listed`; None is its own.

    Raises:
        PackageError: it is no ordinary file, a huge one, or a stand-in for one that Git has not fetched.
    """
    if listed is not None and (name or path.name) not in listed:
        return False
    try:
        found = path.stat()
        if stat.S_ISREG(found.st_mode) and found.st_size < 1024:
            with path.open("rb") as file:
                if file.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise PackageError(f"{path}: is a pointer of Git LFS, not the file: run `git lfs pull` there")
    except FileNotFoundError:
        return False
    except OSError as fault:
        raise PackageError(f"{path}: cannot be read: {fault.strerror}") from None
    if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for, for ever
        raise PackageError(f"{path}: is not an ordinary file")
    if found.st_size > MOST_BYTES:
        raise PackageError(
            f"{path}: has {amount(found.st_size)}; files of tokenizers have at most {amount(MOST_BYTES)}"
        )
    return True


def read_folder_text(folder: Path, listed: Container[str] | None = None) -> FolderText:
    """Read the configuration files and chat templates of a folder, a checkpoint or a package.

    A package has no config.json of a model, and so says less than `build` resolved: `TextInfo` has the rest.

    Args:
        folder: see above.
        listed: names of the files that may be read, with folders; None means all.

    Raises:
        PackageError: a file is corrupt, or has a value that no tokenizer can have.
    """
    config = _read_json(folder / "tokenizer_config.json", listed)
    model = _read_json(folder / "config.json", listed)
    kind = _class_of(folder, config, model)
    add_bos, add_eos = (_flag(folder, config, name) for name in ("add_bos_token", "add_eos_token"))
    if kind in LLAMA_CLASSES:
        add_bos, add_eos = add_bos is not False, bool(add_eos)
    else:
        add_bos = add_eos = None
    tokens, named = _special_tokens(folder, config, listed)
    return FolderText(
        special_tokens=tokens,
        class_tokens={name: text for name, text in CLASS_TOKENS.get(kind, {}).items() if name not in named},
        added_tokens=_added_tokens(folder, config, tokens, listed),
        add_bos_token=add_bos,
        add_eos_token=add_eos,
        eos_token_ids=frozenset(_eos_ids(folder, model, listed)),
        chat_templates=_chat_templates(folder, config, listed, sees=isinstance(model.get("vision_config"), dict)),
    )


def template_file(name: str) -> str:
    """The file of a package that holds the chat template of this name."""
    return "chat_template.jinja" if name == DEFAULT else f"{TEMPLATE_FOLDER}/{name}.jinja"


def read_templates(folder: Path, names: Sequence[str], listed: Container[str] | None) -> dict[str, str]:
    """The chat templates that a package's config.json names.

    Raises:
        PackageError: one is missing, cannot be read, or is larger than any template is.
    """
    found = {}
    for name in names:
        file = folder / template_file(_template_name(folder, name))
        if not is_there(file, listed, template_file(name)):
            raise PackageError(f"{folder}: {template_file(name)} is missing; build the package again")
        found[name] = read_text(file, "the chat template", PackageError)
    return _checked(folder, found)


def _read_json(path: Path, listed: Container[str] | None) -> dict[str, Any]:
    """Content of a JSON file, or {} if there is no such file."""
    return read_json_object(path, PackageError, ADVICE) if is_there(path, listed) else {}


def _class_of(folder: Path, config: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """The name of the tokenizer's class in transformers, without "Fast"; "" where nothing says it."""
    for file, content in (("tokenizer_config.json", config), ("config.json", model)):
        kind = content.get("tokenizer_class")
        if kind is not None and not isinstance(kind, str):
            raise PackageError(f"{folder / file}: tokenizer_class must be a name, got {shorten(kind)}")
        if kind:
            return str(kind).removesuffix("Fast")
    return CLASS_OF_FAMILY.get(str(model.get("model_type")), "")


def _flag(folder: Path, config: Mapping[str, Any], name: str) -> bool | None:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise PackageError(f"{folder / 'tokenizer_config.json'}: {name} must be true or false, got {shorten(value)}")
    return value


def _special_tokens(
    folder: Path, config: Mapping[str, Any], listed: Container[str] | None
) -> tuple[dict[str, str], set[str]]:
    """Named tokens -> text, and all names that the files have, with those of tokens that are said to be none."""
    found: dict[str, str] = {}
    named: set[str] = set()
    sources = [(folder / "tokenizer_config.json", config)]
    if isinstance(extra := config.get("extra_special_tokens"), dict):
        sources.append((sources[0][0], extra))
    if "added_tokens_decoder" not in config:
        map_file = folder / "special_tokens_map.json"
        sources.append((map_file, _read_json(map_file, listed)))
    for file, content in sources:
        for name, value in content.items():
            if not name.endswith("_token"):
                continue
            text = value.get("content") if isinstance(value, dict) else value
            if value is not None and not _is_text(text):
                if isinstance(text, str):
                    called = name if name in TOKENS else shorten(name)
                    raise PackageError(f"{file}: {called} is not valid Unicode: {shorten(text)}; {ADVICE}")
                if name in TOKENS:
                    raise PackageError(f"{file}: {name} must be a token's text, got {shorten(value)}")
                continue  # add_bos_token is none
            named.add(name)
            found.pop(name, None)
            if text:
                found[name] = text
    return found, named


def _added_tokens(
    folder: Path, config: Mapping[str, Any], special: Mapping[str, str], listed: Container[str] | None
) -> list[Mapping[str, Any]]:
    """Fields of the tokens that come to those of tokenizer.json, or replace what it says of them."""
    file, field = folder / "tokenizer_config.json", "added_tokens_decoder"
    texts = set(special.values())
    if field in config:
        said = config[field]
        if not isinstance(said, dict):
            raise PackageError(f"{file}: {field} must be an object, got {shorten(said)}")
        return [_token_fields(file, number, token, texts) for number, token in _by_number(file, said.items())]
    file = folder / "added_tokens.json"
    pairs = [(number, text) for text, number in _read_json(file, listed).items()]
    return [
        {"content": text, "normalized": text not in texts, "special": text in texts}
        for _, text in _by_number(file, pairs)
    ]


def _by_number(file: Path, pairs: Any) -> Iterator[tuple[int, Any]]:
    numbered = []
    for number, value in pairs:
        if not str(number).isdecimal():
            raise PackageError(f"{file}: a token has a number as its id, got {shorten(number)} for {shorten(value)}")
        numbered.append((int(number), value))
    yield from sorted(numbered, key=lambda pair: pair[0])


def _token_fields(file: Path, number: int, token: Any, special: Container[str]) -> Mapping[str, Any]:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    content = token.get("content") if isinstance(token, dict) else None
    if not isinstance(content, str) or not all(isinstance(token.get(flag, False), bool) for flag in flags):
        raise PackageError(f"{file}: the added token {number} must have a content and flags, got {shorten(token)}")
    fields = {flag: token[flag] for flag in flags if flag in token}
    return {"content": content, **fields, "special": fields.get("special", False) or content in special}


def _eos_ids(folder: Path, model: Mapping[str, Any], listed: Container[str] | None) -> set[int]:
    ids: set[int] = set()
    files = {"generation_config.json": _read_json(folder / "generation_config.json", listed), "config.json": model}
    for name, config in files.items():
        text_config = config.get("text_config")  # a vision model has the language model's fields there
        for part in (config, text_config if isinstance(text_config, dict) else {}):
            found = part.get("eos_token_id")
            said = found if isinstance(found, list) else [] if found is None else [found]
            if not all(type(i) is int and i >= 0 for i in said):
                raise PackageError(
                    f"{folder / name}: eos_token_id must be token ids, got {shorten(found)}; name the token that ends "
                    "an answer, or leave the key out"
                )
            ids.update(said)
    return ids


def _chat_templates(
    folder: Path, config: Mapping[str, Any], listed: Container[str] | None, *, sees: bool
) -> dict[str, str]:
    jinja, legacy = folder / "chat_template.jinja", folder / "chat_template.json"
    own = _named(folder / "tokenizer_config.json", config.get("chat_template"))
    of_processor = _named(legacy, _read_json(legacy, listed).get("chat_template"))
    text = {DEFAULT: read_text(jinja, "the chat template", PackageError)} if is_there(jinja, listed) else {}
    # The later ones win.
    found = own | text | of_processor if sees else (own | text or of_processor)
    for name in _additional(folder, listed):
        file = folder / template_file(name)
        if is_there(file, listed, template_file(name)):
            found[name] = read_text(file, "the chat template", PackageError)
    return _checked(folder, found)


def _additional(folder: Path, listed: Container[str] | None) -> list[str]:
    """The names of the templates of additional_chat_templates/."""
    if listed is None:
        names = [file.name for file in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))]
    else:
        files = [str(name) for name in listed] if isinstance(listed, Mapping | Sequence | set | frozenset) else []
        begin = f"{TEMPLATE_FOLDER}/"
        names = sorted(name.removeprefix(begin) for name in files if name.startswith(begin))
    return [name.removesuffix(".jinja") for name in names]


def _named(file: Path, value: Any) -> dict[str, str]:
    """Templates by name: of a text, an object of them, or a list of objects with `name` and `template`.

    What is none of these is no template.
    """
    if isinstance(value, list):
        pairs = [(each.get("name"), each.get("template")) for each in value if isinstance(each, dict)]
    else:
        pairs = list(value.items()) if isinstance(value, dict) else [(DEFAULT, value)]
    found = {name: template for name, template in pairs if isinstance(name, str) and isinstance(template, str)}
    for name, template in found.items():
        if not _is_text(template):
            raise PackageError(f"{file}: the chat template {shorten(name)} is not valid Unicode; {ADVICE}")
    return found


def _is_text(value: Any) -> bool:
    """Whether a value of a JSON file is text that a package can have."""
    return isinstance(value, str) and is_unicode(value)


def _template_name(folder: Path, name: str) -> str:
    if not TEMPLATE_NAME.fullmatch(name):
        raise PackageError(
            f"{folder}: the chat template {shorten(name)} has no name that a file can have; rename it in the files of "
            "the model"
        )
    return name


def _checked(folder: Path, templates: dict[str, str]) -> dict[str, str]:
    if len(templates) > MOST_TEMPLATES:
        raise PackageError(f"{folder}: has {len(templates)} chat templates; at most {MOST_TEMPLATES} are taken")
    for name, template in templates.items():
        _template_name(folder, name)
        if len(template) > MOST_TEMPLATE_CHARS:
            raise PackageError(
                f"{folder}: the chat template has {len(template):,} characters; at most {MOST_TEMPLATE_CHARS:,} are "
                "taken"
            )
    return templates
