"""Text to token ids and back, from the files of a Hugging Face folder, with the `tokenizers` package alone.

`TextStream` turns ids into text one at a time. Whatever the ids, what it returns adds up to `Tokenizer.decode` of them
all. (`tokenizers.decoders.DecodeStream` does not promise that: it withholds text that ends in a real U+FFFD, and raises
on some invalid UTF-8.) The work per token is constant, and so is the memory but for one case, noted at `_PieceStream`.
"""

import codecs
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from trimkv_export.errors import MissingDependencyError, OptionError, PackageError, UnsupportedModelError
from trimkv_export.files import read_regular

__all__ = ["TextStream", "Tokenizer"]


class Tokenizer:
    """A tokenizer and what its folder says about special tokens and chat.

    vocab_size: number of tokens, added ones included; a model may have more logits, whose ids decode to nothing.
    eos_ids: every id that ends a generation, from generation_config.json, config.json and tokenizer_config.json.
    bos_token, eos_token, pad_token: their text, or None where tokenizer_config.json names none.
    chat_template: Jinja source of the (default) chat template, or None.
    """

    def __init__(self, backend: Any, folder: Path, listed: Container[str] | None = None) -> None:
        """Wrap a `tokenizers.Tokenizer`, with the configuration files of `folder`; `open` is the usual way in."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        config = _read_json(folder / "tokenizer_config.json", listed)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.bos_token = _token_text(config.get("bos_token"))
        self.eos_token = _token_text(config.get("eos_token"))
        self.pad_token = _token_text(config.get("pad_token"))
        self.eos_ids = self._find_eos_ids(folder, listed)
        self.chat_template = _find_chat_template(folder, config, listed)

    @classmethod
    def open(cls, folder: Path, listed: Container[str] | None = None) -> "Tokenizer":
        """Read `folder`: tokenizer.json, and where present the configuration and chat template files beside it.

        listed: names of the files that may be read, those that a package's config.json lists; None means all.
        Raises PackageError when tokenizer.json is missing or a file is corrupt.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise MissingDependencyError(
                "tokenizing needs the 'tokenizers' package: pip install 'trimkv-export[runtime]'"
            ) from error
        path = folder / "tokenizer.json"
        text = _read_text(path, listed)
        if text is None:
            raise PackageError(f"{folder} has no tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises nothing more specific
            raise PackageError(f"{path} is not a tokenizer that can be read: {error}") from error
        return cls(backend, folder, listed)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written in the text become their ids.

        add_special_tokens: also add what tokenizer.json puts around a text, such as a begin-of-text token. Pass
        False for the output of a chat template, which has them already.
        Raises OptionError for text that is no valid Unicode (lone surrogates).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise OptionError(f"the text is not valid Unicode: {error}") from error
        # Not `encode`: that one keeps other threads of Python waiting, for a second a megabyte, and finds offsets, too.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Bytes that are no valid UTF-8 come out as U+FFFD, ids outside the vocabulary as nothing."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def stream(self, *, skip_special_tokens: bool = True) -> "TextStream":
        """Start a text to which tokens are added one at a time.

        Raises UnsupportedModelError for a decoder whose text for a token can depend on the tokens after it.
        """
        decoder = self._backend.decoder
        steps = [] if decoder is None else _flatten(json.loads(decoder.__getstate__()))
        if [step["type"] for step in steps] == ["ByteLevel"]:
            return _ByteLevelStream(self._backend, skip_special_tokens)
        if _is_local(steps):
            bytes_fall_back = any(step["type"] == "ByteFallback" for step in steps)
            return _PieceStream(self._backend, skip_special_tokens, bytes_fall_back)
        raise UnsupportedModelError(
            f"cannot stream the text of a tokenizer with decoder {' + '.join(step['type'] for step in steps)}; "
            "ByteLevel and SentencePiece-like decoders can be"
        )

    def _find_eos_ids(self, folder: Path, listed: Container[str] | None) -> frozenset[int]:
        ids = set()
        for name in ("generation_config.json", "config.json"):
            config = _read_json(folder / name, listed)
            text_config = config.get("text_config")  # a VLM has the language model's fields there
            for part in (config, text_config if isinstance(text_config, dict) else {}):
                found = part.get("eos_token_id")
                said = found if isinstance(found, list) else [] if found is None else [found]
                if not all(type(i) is int and i >= 0 for i in said):
                    raise PackageError(f"{folder / name}: eos_token_id must be token ids, got {found!r}")
                ids.update(said)
        if self.eos_token is not None and (eos := self._backend.token_to_id(self.eos_token)) is not None:
            ids.add(eos)
        return frozenset(ids)


class TextStream(ABC):
    """Text of a growing sequence of tokens. All of push() and the last flush() together are `decode` of the tokens."""

    def __init__(self, backend: Any, skip_special_tokens: bool) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder().values() if skip_special_tokens else ()
        self._skipped = frozenset(token.content for token in added if token.special)

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now final, "" while a character is incomplete."""
        piece = self._backend.id_to_token(token)
        if piece is None or piece in self._skipped:
            return ""
        return self._add(token, piece)

    @abstractmethod
    def _add(self, token: int, piece: str) -> str: ...

    @abstractmethod
    def flush(self) -> str:
        """What is left once no token follows; an incomplete character comes out as U+FFFD."""


class _ByteLevelStream(TextStream):
    """GPT-2 style (Qwen, Llama 3): each character of a vocabulary entry stands for one byte of UTF-8 text."""

    def __init__(self, backend: Any, skip_special_tokens: bool) -> None:
        super().__init__(backend, skip_special_tokens)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def _add(self, token: int, piece: str) -> str:  # noqa: ARG002
        try:
            data = bytes([_BYTE_OF[char] for char in piece])
        except KeyError:  # an added token outside the alphabet stands for itself
            data = piece.encode()
        return self._utf8.decode(data)

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _PieceStream(TextStream):
    """SentencePiece style (Llama 2, Phi-3): the text of a token depends on others in two ways only.

    (1) Leading space is stripped from the start of the text. So the first tokens are decoded together until they give
    some text, and each later token after a fixed token, the anchor, whose text is cut off again.
    (2) A run of byte tokens (<0x0A>) is text if *all* of it is valid UTF-8, else one U+FFFD per byte. So a run is held
    back until it ends, or until it is known to be invalid: memory is bounded but for an endless run of valid bytes.
    """

    def __init__(self, backend: Any, skip_special_tokens: bool, bytes_fall_back: bool) -> None:
        super().__init__(backend, skip_special_tokens)
        self._byte = re.compile("<0x([0-9A-Fa-f]{2})>" if bytes_fall_back else "(?!)")
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")
        self._run: list[int] = []
        self._run_is_invalid = False
        self._head: list[int] | None = []  # the tokens so far while they have no text; None once there is text
        self._anchor, self._anchor_text = self._find_anchor()

    def _find_anchor(self) -> tuple[list[int], str]:
        for token in range(self._backend.get_vocab_size(with_added_tokens=True)):
            piece = self._backend.id_to_token(token)
            if piece and not self._byte.fullmatch(piece) and (text := self._decode([token])):
                return [token], text
        return [], ""  # a vocabulary of bytes alone needs none

    def _add(self, token: int, piece: str) -> str:
        if byte := self._byte.fullmatch(piece):
            return self._add_byte(token, bytes.fromhex(byte[1]))
        return self._end_run(token)

    def _add_byte(self, token: int, byte: bytes) -> str:
        if self._run_is_invalid:
            return "\ufffd"
        self._run.append(token)
        try:
            self._utf8.decode(byte)
        except UnicodeDecodeError:
            text = "\ufffd" * len(self._run)
            self._run, self._run_is_invalid, self._head = [], True, None
            return text
        return ""

    def _end_run(self, *tokens: int) -> str:
        ids = [*self._run, *tokens]
        self._run, self._run_is_invalid = [], False
        self._utf8.reset()
        if self._head is None:
            return self._decode(self._anchor + ids)[len(self._anchor_text) :]
        self._head += ids
        text = self._decode(self._head)
        if text:
            self._head = None
        return text

    def flush(self) -> str:
        return self._end_run()

    def _decode(self, ids: list[int]) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=False)  # push has skipped them
        return text


def _bytes_of_chars() -> dict[str, int]:
    """The byte-level alphabet of GPT-2: printable Latin-1 stands for itself, the other 68 bytes for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _bytes_of_chars()


def _flatten(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps of a decoder in tokenizer.json, in order, with sequences resolved."""
    if decoder["type"] == "Sequence":
        return [step for part in decoder["decoders"] for step in _flatten(part)]
    return [decoder]


def _is_local(steps: list[dict[str, Any]]) -> bool:
    """Whether a token's text depends on others only as `_PieceStream` says. `Fuse` joins the tokens into one text."""
    kinds = [step["type"] for step in steps]
    fused = kinds.index("Fuse") if "Fuse" in kinds else len(kinds)
    each_token, whole_text = set(kinds[:fused]), set(kinds[fused:])
    strips_end = any(step["type"] == "Strip" and step["stop"] > 0 for step in steps)
    return (
        each_token <= {"Replace", "ByteFallback", "Metaspace", "Strip"}
        and whole_text <= {"Fuse", "Strip"}
        and not strips_end
    )


def _read_text(path: Path, listed: Container[str] | None) -> str | None:
    """Content of a text file, or None if there is no such file, or none that may be read."""
    if listed is not None and path.name not in listed:
        return None
    try:
        return read_regular(path).decode()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise PackageError(f"{path} cannot be read: {error}") from error


def _read_json(path: Path, listed: Container[str] | None) -> dict[str, Any]:
    """Content of a JSON file, or {} if there is no such file."""
    text = _read_text(path, listed)
    if text is None:
        return {}
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PackageError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise PackageError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _token_text(token: Any) -> str | None:
    """Text of a token in tokenizer_config.json, which is a string or an object with `content`."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _find_chat_template(folder: Path, config: Mapping[str, Any], listed: Container[str] | None) -> str | None:
    """The chat template; the files are searched in the order of Hugging Face transformers."""
    template: Any = _read_text(folder / "chat_template.jinja", listed)
    if template is None:
        template = config.get("chat_template")
    if template is None:
        template = _read_json(folder / "chat_template.json", listed).get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
