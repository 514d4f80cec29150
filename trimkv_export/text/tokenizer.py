"""Text to token ids and back, from the files of a Hugging Face folder, with the `tokenizers` package alone.

`TextStream` turns ids into text one at a time. Whatever the ids, what it returns adds up to `Tokenizer.decode` of them
all. (`tokenizers.decoders.DecodeStream` does not promise that: it withholds text that ends in a real U+FFFD, and raises
on some invalid UTF-8.) The work per token is constant, and so is the memory but for one case, noted at `_PieceDecoder`.

The files come with a checkpoint, so they are by a stranger: whatever the `tokenizers` package makes of them is an error
of ours, its panics too, which Python's `except Exception` does not see.
"""

import codecs
import contextlib
import json
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trimkv_export.errors import OptionError, PackageError, UnsupportedModelError, missing
from trimkv_export.files import read_text
from trimkv_export.text.chat import render_chat
from trimkv_export.text.growth import check_growth
from trimkv_export.text.literal import ControlTokens
from trimkv_export.text.resolve import DEFAULT, TextInfo, is_there, read_folder_text, read_templates
from trimkv_export.text.stop_words import StopFilter
from trimkv_export.words import first_line

__all__ = ["TextStream", "Tokenizer"]

# The template that transformers takes in place of the default one for a conversation with tools.
WITH_TOOLS = "tool_use"


class Tokenizer:
    """A tokenizer and what its folder says about special tokens and chat.

    Attributes:
        vocab_size: number of tokens, added ones included; a model may have more logits, whose ids decode to nothing.
        special_tokens: bos_token, eos_token and the like -> text, as chat templates know them.
        eos_ids: every id that ends a generation, from generation_config.json, config.json and the tokenizer's own.
        chat_templates: name -> Jinja source.
        info: all of this as a package's config.json has it.
    """

    def __init__(
        self, backend: Any, folder: Path, listed: Container[str] | None = None, info: TextInfo | None = None
    ) -> None:
        """Wrap a `tokenizers.Tokenizer`, with the configuration files of `folder`; `open` is the usual way in."""
        self._backend, self._folder = backend, folder
        said = read_folder_text(folder, listed)
        with self._at_work("set up"):
            backend.no_truncation()
            backend.no_padding()
            if said.added_tokens:
                from tokenizers import AddedToken

                backend.add_tokens([AddedToken(**fields) for fields in said.added_tokens])
            if info is None:
                known = {name: text for name, text in said.class_tokens.items() if self._id(text) is not None}
                tokens = {**known, **said.special_tokens}
                add_bos, add_eos, ids = said.add_bos_token, said.add_eos_token, said.eos_token_ids
                templates = dict(said.chat_templates)
            else:
                tokens, ids = dict(info.special_tokens), frozenset(info.eos_token_ids)
                add_bos, add_eos = info.add_bos_token, info.add_eos_token
                templates = read_templates(folder, info.chat_templates, listed)
            self.special_tokens, self.chat_templates = tokens, templates
            end = self._id(tokens.get("eos_token"))
            self.eos_ids: frozenset[int] = ids | ({end} if end is not None else frozenset())
            self.info = TextInfo(tokens, sorted(self.eos_ids), add_bos, add_eos, sorted(templates))
            self._set_ends(bool(add_bos), bool(add_eos), told=add_bos is not None or add_eos is not None)
            check_growth(backend, str(folder / "tokenizer.json"))
            self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
            self._control = ControlTokens(backend)
        self._literal: Any = None
        self._making_literal = threading.Lock()

    def _id(self, text: str | None) -> int | None:
        found: int | None = None if text is None else self._backend.token_to_id(text)
        return found

    def _set_ends(self, add_bos: bool, add_eos: bool, *, told: bool) -> None:
        """Have a text begin and end as the tokenizer's class of transformers has it."""
        wanted = [name for name, add in (("bos_token", add_bos), ("eos_token", add_eos)) if add]
        texts = {name: self.special_tokens.get(name) for name in wanted}
        ids = {name: self._id(text) for name, text in texts.items()}
        if not told or None in ids.values():  # a token that the vocabulary lacks cannot be written
            return
        from tokenizers.processors import TemplateProcessing

        # Pieces have names of their own here, for a token may have a space or a colon in it, and a name may not.
        before, after = ([f"{name}:0"] * (name in ids) for name in ("bos_token", "eos_token"))
        single = " ".join([*before, "$A:0", *after])
        pieces = [{"id": name, "ids": [ids[name]], "tokens": [texts[name]]} for name in ids]
        self._backend.post_processor = TemplateProcessing(single=single, pair=f"{single} $B:1", special_tokens=pieces)

    @property
    def bos_token(self) -> str | None:
        """The text of the token that begins a text; None where no file names one."""
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """The same of the token that ends one."""
        return self.special_tokens.get("eos_token")

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the chat template; None where there is none, or none by the name "default"."""
        return self.chat_templates.get(DEFAULT)

    def template_for(self, variables: Mapping[str, Any]) -> str | None:
        """The chat template for a conversation with these variables: of several, tools have one of their own."""
        tools = variables.get("tools") is not None
        return (self.chat_templates.get(WITH_TOOLS) if tools else None) or self.chat_template

    def ids_from(self, limit: int) -> dict[str, int]:
        """The tokens whose ids are `limit` or more, by text: those that a model of so many tokens does not know."""
        with self._at_work("say what tokens it has"):
            known = self._backend.get_vocab(with_added_tokens=True)
        return {text: number for text, number in known.items() if number >= limit}

    def knows(self, text: str) -> bool:
        """Whether a token of this text is in the vocabulary."""
        with self._at_work("say what tokens it has"):
            return self._id(text) is not None

    def added_tokens(self) -> set[str]:
        """The texts of the tokens that are no part of the tokenizer's own vocabulary, but were added to it."""
        with self._at_work("say what tokens it has"):
            return {token.content for token in self._backend.get_added_tokens_decoder().values()}

    @classmethod
    def open(cls, folder: Path, listed: Container[str] | None = None, info: TextInfo | None = None) -> "Tokenizer":
        """Read `folder`: tokenizer.json, and where present the configuration and chat template files with it.

        Args:
            folder: a package or a checkpoint.
            listed: names of the files that may be read, those that a package's config.json lists; None means all.
            info: what `build` resolved; None resolves it here (`text.resolve`).

        Raises:
            PackageError: tokenizer.json is missing, or a file is corrupt or larger than any such file is.
            MissingDependencyError: tokenizers is not installed.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise missing("reading text", "tokenizers", "runtime") from error
        path = folder / "tokenizer.json"
        if not is_there(path, listed):
            raise PackageError(f"{folder}: has no tokenizer.json: copy it from the checkpoint")
        text = read_text(path, "the tokenizer", PackageError)
        with _library(f"{path} is not a tokenizer that can be read"):
            backend = tokenizers.Tokenizer.from_str(text)
        return cls(backend, folder, listed, info)

    def encode(self, text: str, *, add_special_tokens: bool = True, literal: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text.
            add_special_tokens: also add what tokenizer.json puts around a text, such as a begin-of-text token. Pass
                False for the output of a chat template, which has them already.
            literal: special tokens that are written in the text stay text. Otherwise they become their ids.

        Raises:
            OptionError: the text is not valid Unicode (lone surrogates); with `literal`, the vocabulary has no other
                way to write a special token.
        """
        if literal:
            return self.encode_marked(self.mark(text), add_special_tokens=add_special_tokens)
        return list(self._encoding(self._backend, text, add_special_tokens).ids)

    def mark(self, text: str) -> str:
        """A text for `encode_marked`, with which special tokens in it stay text. Raises as `ControlTokens.mark`."""
        return self._control.mark(text)

    def encode_marked(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text that `render_chat(literal=True)` has rendered: what users wrote there stays text.

        Args:
            text: with marks (`trimkv_export.text.literal`), which are left out.
            add_special_tokens: as for `encode`.

        Raises:
            OptionError: as `encode` with `literal`.
        """
        parts = []
        for part, literal in self._control.split(text):
            encoding = self._encoding(self._plain_backend() if literal else self._backend, part, False)
            for token in self._control.ids.intersection(encoding.ids) if literal else ():
                if (name := self._backend.id_to_token(token)) in part:  # others say that a character is not known
                    raise OptionError(f"this tokenizer cannot write {name!r} as text; leave it out of the prompt")
            parts.append(encoding)
        if not add_special_tokens:
            return [token for encoding in parts for token in encoding.ids]
        with self._at_work("encode a text"):
            merged = type(parts[0]).merge(parts) if parts else self._backend.encode("", add_special_tokens=False)
            return list(self._backend.post_process(merged, add_special_tokens=True).ids)

    def _plain_backend(self) -> Any:
        """The tokenizer without its special tokens. Made when it is first needed, for it takes as much memory again."""
        with self._making_literal:
            if self._literal is None:
                with self._at_work("be made without its special tokens"):
                    self._literal = self._control.backend_without(self._backend)
            return self._literal

    def _encoding(self, backend: Any, text: str, add_special_tokens: bool) -> Any:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise OptionError(f"the text is not valid Unicode: {error}") from error
        # Not `encode`: that one keeps other threads of Python waiting, for a second a megabyte, and finds offsets, too.
        with self._at_work("encode a text"):
            (encoding,) = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        literal: bool = False,
        **variables: Any,
    ) -> str:
        """The text of a conversation in the model's chat template; encode it with add_special_tokens=False.

        Args:
            messages: each with `role` ("system", "user", "assistant", …) and `content`, as for `text.chat.render_chat`.
            add_generation_prompt: end with the header of the assistant's next message.
            literal: mark what the messages say, the assistant's own apart, so that `encode_marked` takes special tokens
                in it as text.
            variables: of the template, such as enable_thinking=False.

        Raises:
            OptionError: there is no template; or as `text.chat.render_chat`.
        """
        template = self.template_for(variables)
        if template is None:
            raise OptionError(f"{self._folder}: there is no chat template; leave chat out")
        if literal:
            messages = [self._control.mark_message(message) for message in messages]
        return render_chat(
            template, messages, add_generation_prompt=add_generation_prompt, **(self.special_tokens | variables)
        )

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Bytes that are not valid UTF-8 come out as U+FFFD, ids outside the vocabulary as nothing."""
        with self._at_work("decode tokens"):
            text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def stream(
        self, *, skip_special_tokens: bool = True, after: Sequence[int] = (), stop: Sequence[str] = ()
    ) -> "TextStream":
        """Start a text to which tokens are added one at a time.

        Args:
            skip_special_tokens: leave special tokens out.
            after: the tokens before, such as a prompt's. SentencePiece decoders drop the space at the start of a text;
                so without them, an answer that goes on with a prompt loses it.
            stop: texts that end it and are not part of it. Special tokens count, whether they are shown or not.

        Raises:
            UnsupportedModelError: the decoder's text for a token can depend on the tokens after it.
        """
        with self._at_work("say how it decodes"):
            decoder = self._backend.decoder
            steps = [] if decoder is None else _flatten(json.loads(decoder.__getstate__()))
            found: _Decoder
            if [step["type"] for step in steps] == ["ByteLevel"]:
                found = _ByteLevelDecoder()
            elif _is_local(steps):
                bytes_fall_back = any(step["type"] == "ByteFallback" for step in steps)
                found = _PieceDecoder(self._backend, bytes_fall_back, bool(stop))
            else:
                raise UnsupportedModelError(
                    f"the text of a tokenizer with the decoder {' + '.join(step['type'] for step in steps)} cannot be "
                    "streamed; that of ByteLevel and SentencePiece-like decoders can"
                )
            return TextStream(self._backend, found, skip_special_tokens, after, stop)

    def _at_work(self, doing: str) -> contextlib.AbstractContextManager[None]:
        return _library(f"{self._folder / 'tokenizer.json'}: the tokenizer cannot {doing}")


class TextStream:
    """Text of a growing sequence of tokens, made by `Tokenizer.stream`.

    All of push() and the last flush() together are `decode` of the tokens, up to a stop word. With stop words, bytes
    that are whole characters are text at once; without, invalid ones that follow directly can still spoil them, as
    `decode` has it.

    Attributes:
        stopped: whether a stop word has ended the text; more tokens add nothing.
    """

    def __init__(
        self, backend: Any, decoder: "_Decoder", skip_special_tokens: bool, after: Sequence[int], stop: Sequence[str]
    ) -> None:
        """As `Tokenizer.stream`. decoder: makes text of tokens; it has had none."""
        self._backend, self._decoder = backend, decoder
        added = backend.get_added_tokens_decoder().values() if skip_special_tokens else ()
        self._skipped = frozenset(token.content for token in added if token.special)
        for token in after:
            if decoder.begun:  # what is further on makes no difference
                break
            piece = self._piece(token)
            if piece is not None and piece not in self._skipped:
                decoder.add(token, piece)
        decoder.flush()
        self._stops = StopFilter(stop)

    @property
    def stopped(self) -> bool:
        """See the class."""
        return self._stops.stopped

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now final, "" while a character or a stop word may be incomplete."""
        piece = self._piece(token)
        if piece is None or self.stopped:
            return ""
        if piece in self._skipped:
            return self._stops.push(piece, shown=False)
        with _library("the tokenizer cannot decode a token"):
            text = self._decoder.add(token, piece)
        return self._stops.push(text)

    def flush(self) -> str:
        """What is left once no token follows; an incomplete character comes out as U+FFFD."""
        if self.stopped:
            return ""
        with _library("the tokenizer cannot decode a token"):
            text = self._decoder.flush()
        return self._stops.push(text) + self._stops.flush()

    def _piece(self, token: int) -> str | None:
        with _library("the tokenizer cannot look a token up"):
            piece: str | None = self._backend.id_to_token(token)
        return piece


class _Decoder(ABC):
    """Tokens that are not skipped to text.

    Attributes:
        begun: whether there was text, so that the start of the text is behind.
    """

    begun = False

    @abstractmethod
    def add(self, token: int, piece: str) -> str:
        """Add a token and its entry of the vocabulary -> text that is final."""

    @abstractmethod
    def flush(self) -> str:
        """The rest; tokens may follow, of another run of bytes."""


class _ByteLevelDecoder(_Decoder):
    """GPT-2 style (Qwen, Llama 3): each character of a vocabulary entry stands for one byte of UTF-8 text."""

    begun = True  # the start of a text is like the rest of it

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int, piece: str) -> str:  # noqa: ARG002
        try:
            data = bytes([_BYTE_OF[char] for char in piece])
        except KeyError:  # an added token outside the alphabet stands for itself
            data = piece.encode()
        return self._utf8.decode(data)

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _PieceDecoder(_Decoder):
    """SentencePiece style (Llama 2, Phi-3): the text of a token depends on others in two ways only.

    (1) Leading space is stripped from the start of the text. So the first tokens are decoded together until they give
    some text, and each later token after a fixed token, the anchor, whose text is cut off again.
    (2) A run of byte tokens (<0x0A>) is text if *all* of it is valid UTF-8, else one U+FFFD per byte. So a run is held
    back until it ends, or until it is known to be invalid: memory is bounded but for an endless run of valid bytes.
    With `eager`, a run ends with each whole character.
    """

    def __init__(self, backend: Any, bytes_fall_back: bool, eager: bool) -> None:
        self._backend, self._eager = backend, eager
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

    @property
    def begun(self) -> bool:  # type: ignore[override]
        return self._head is None

    def add(self, token: int, piece: str) -> str:
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
        return self._end_run() if self._eager and not self._utf8.getstate()[0] else ""

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


@contextlib.contextmanager
def _library(what: str) -> Iterator[None]:
    """Around calls of the `tokenizers` package: what it raises is a PackageError that begins with `what`."""
    try:
        yield
    except (OptionError, PackageError, UnsupportedModelError, OverflowError, TypeError, MemoryError):
        raise
    except BaseException as error:
        # It raises plain exceptions; a panic of its Rust code is a BaseException.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise PackageError(f"{what}: {first_line(error)}; copy tokenizer.json from the checkpoint again") from None
