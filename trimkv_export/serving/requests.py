"""The fields of a request: one table for config.pbtxt and for their validation.

What is checked here costs little, for it holds up the server: files are taken out of base64 by `media_file`, on the
threads that read requests.
"""

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from numpy.typing import NDArray

from trimkv_export.checks import require_whole
from trimkv_export.config import MAX_COUNT
from trimkv_export.errors import OptionError
from trimkv_export.files import decode_text
from trimkv_export.serving.options import ServingOptions
from trimkv_export.serving.replies import RequestError
from trimkv_export.text.sampling import SamplingOptions
from trimkv_export.words import shorten

__all__ = ["INPUTS", "OUTPUTS", "Field", "GenerateRequest", "media_file", "parse_request", "read_tensors"]

T = TypeVar("T")

MAX_STOP_WORDS, MAX_STOP_WORD_CHARS = 16, 256
MAX_STOP_TOKENS, MAX_BIASES = 256, 4096
MAX_MESSAGES = 1024
# Of JSON in a request: how deep, and how long where it is no text for the model.
MAX_DEPTH, MAX_JSON_BYTES = 32, 1 << 18
MAX_TOKEN_ID = 2**31 - 1
SESSION_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# RFC 2397: the type and its parameters may be left out, and names are in either case.
DATA_URL = re.compile(rb"data:[^,;]{0,256}(?:;[^,;]{1,256}){0,16}?;base64,", re.IGNORECASE)
URL = re.compile(rb"(?:[a-z][a-z0-9+.-]{1,20}://|data:)", re.IGNORECASE)
WHITESPACE = b" \t\r\n\f\v"
PIECE = 1 << 20  # base64 is decoded in pieces, between which other threads get their turn
# What the chat template gets from us.
RESERVED = ("messages", "add_generation_prompt", "continue_final_message", "bos_token", "eos_token")


class Field(NamedTuple):
    """An input or output; `kind` is Triton's type without TYPE_, and `many` allows any number of values, else one."""

    name: str
    kind: str
    many: bool = False


INPUTS = (
    Field("text_input", "STRING"),
    Field("max_tokens", "INT32"),
    Field("stream", "BOOL"),
    Field("temperature", "FP32"),
    Field("top_p", "FP32"),
    Field("top_k", "INT32"),
    Field("min_p", "FP32"),
    Field("repetition_penalty", "FP32"),
    Field("presence_penalty", "FP32"),
    Field("frequency_penalty", "FP32"),
    Field("seed", "UINT64"),
    Field("min_tokens", "INT32"),
    Field("end_id", "INT32"),
    Field("ignore_eos", "BOOL"),
    Field("stop_words", "STRING", many=True),
    Field("stop_token_ids", "INT32", many=True),
    Field("logit_bias", "STRING"),
    Field("image", "STRING", many=True),
    Field("video", "STRING", many=True),
    Field("video_fps", "FP32"),
    Field("max_frames", "INT32"),
    Field("chat", "BOOL"),
    Field("literal", "BOOL"),
    Field("messages", "STRING"),
    Field("chat_template_kwargs", "STRING"),
    Field("exclude_input_in_output", "BOOL"),
    Field("return_num_input_tokens", "BOOL"),
    Field("return_num_output_tokens", "BOOL"),
    Field("session_id", "STRING"),
    Field("session_start", "BOOL"),
    Field("session_end", "BOOL"),
    Field("sampling_parameters", "STRING"),
    Field("probe", "BOOL"),
)
OUTPUTS = (
    Field("text_output", "STRING"),
    Field("finish_reason", "STRING"),
    Field("num_input_tokens", "UINT32"),
    Field("num_output_tokens", "UINT32"),
)
BY_NAME = {entry.name: entry for entry in INPUTS}
# In sampling_parameters and in the request's parameters. "stop" is vLLM's name. null is as if it were not there.
PARAMETERS = (
    "max_tokens",
    "stream",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "min_tokens",
    "end_id",
    "ignore_eos",
    "stop_token_ids",
    "logit_bias",
    "chat_template_kwargs",
    "stop",
)
NUMPY_KINDS = {"STRING": "OSU", "BOOL": "b", "INT32": "iu", "UINT64": "iu", "FP32": "f"}


@dataclass(frozen=True)
class GenerateRequest:
    """A request whose fields were checked.

    Attributes:
        text: the prompt, or with `chat` the user's message.
        max_tokens: the most new tokens.
        sampling: how tokens are chosen.
        min_tokens: no token ends the text before so many.
        end_id: ends the text in place of the tokenizer's end tokens; -1: nothing does.
        ignore_eos: neither the tokenizer's end tokens nor `end_id` end the text.
        stop_token_ids: tokens that end the text as well.
        stop_words: texts that end the answer; they are not part of it.
        images, videos: files as they arrived; `media_file` reads them.
        video_fps: frames to take of each second of a video; None: as many as the model's processor takes.
        max_frames: the most frames to take; None: as many as the server allows.
        chat: the prompt is made by the model's chat template.
        literal: special tokens that stand in the text stay text.
        messages: of the chat, before the user's message.
        template: further variables of the chat template.
        stream: send text as it comes.
        echo: the prompt's text is part of the answer.
        return_num_input_tokens, return_num_output_tokens: send these counts.
        session_id: the conversation to go on with, or with `session_start` to begin.
        session_start: begin it.
        session_end: forget it afterwards.
        probe: ask for nothing but a sign of life of the engine.
    """

    text: str
    max_tokens: int = 256
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    min_tokens: int = 0
    end_id: int | None = None
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    stop_words: tuple[str, ...] = ()
    images: tuple[bytes, ...] = ()
    videos: tuple[bytes, ...] = ()
    video_fps: float | None = None
    max_frames: int | None = None
    chat: bool = False
    literal: bool = False
    messages: tuple[Mapping[str, Any], ...] = ()
    template: Mapping[str, Any] = field(default_factory=dict)
    stream: bool = False
    echo: bool = False
    return_num_input_tokens: bool = False
    return_num_output_tokens: bool = False
    session_id: str | None = None
    session_start: bool = False
    session_end: bool = False
    probe: bool = False

    @property
    def text_size(self) -> int:
        """Characters of its texts, roughly."""
        return len(self.text) + (len(str(self.messages)) if self.messages else 0)


def read_tensors(tensors: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """Python values of input tensors: bytes, bool, int or float, lists of them for what may have many values.

    `parse_request` decodes texts.

    Raises:
        RequestError: a tensor has the wrong type or size.
    """
    values: dict[str, Any] = {}
    for name, array in tensors.items():
        known = BY_NAME.get(name)
        if known is None:
            raise RequestError("invalid", f"unknown input {shorten(name)}; known are {', '.join(BY_NAME)}")
        if array.dtype.kind not in NUMPY_KINDS[known.kind]:
            raise RequestError("invalid", f"{name} must be of type {known.kind}, got {array.dtype}")
        found = array.reshape(-1).tolist()
        if not known.many and len(found) != 1:
            raise RequestError("invalid", f"{name} must be one value, got {len(found)} in shape {list(array.shape)}")
        values[name] = found if known.many else found[0]
    return values


def parse_request(
    values: Mapping[str, Any], options: ServingOptions, parameters: Mapping[str, Any] | None = None
) -> GenerateRequest:
    """Check every field of a request.

    A field in several places has the value of the first of: its input, sampling_parameters, parameters.

    Args:
        values: as `read_tensors` gives them.
        options: the limits, and the defaults.
        parameters: the request's own, with the fields of `sampling_parameters`; what Triton's front ends add for
            themselves (triton_…) is left aside.

    Raises:
        RequestError: it names the field and quotes its value.
    """
    try:
        merged = _merge(values, parameters or {})
        return _parse(merged, options)
    except OptionError as error:
        raise RequestError("invalid", str(error)) from None


def _merge(values: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    outer = {name: value for name, value in parameters.items() if not name.startswith("triton_")}
    inner: dict[str, Any] = {}
    if (raw := values.get("sampling_parameters")) is not None:
        inner = _json("sampling_parameters", raw, dict, MAX_JSON_BYTES)
    for where, found in (("parameter", outer), ("sampling parameter", inner)):
        if unknown := sorted(set(found) - set(PARAMETERS)):
            raise OptionError(f"unknown {where} {shorten(unknown[0])}; known are {', '.join(PARAMETERS)}")
    merged = {name: value for name, value in [*outer.items(), *inner.items()] if value is not None}
    if "stop" in merged:
        stop = merged.pop("stop")
        merged["stop_words"] = stop if isinstance(stop, list) else [stop]
    return {**merged, **values}


def _parse(values: Mapping[str, Any], options: ServingOptions) -> GenerateRequest:
    def whole(name: str, default: int, low: int, high: int) -> int:
        return require_whole(name, values.get(name, default), low, high)

    def number(name: str, default: float) -> float:
        return _number(name, values.get(name, default))  # SamplingOptions knows the range

    def flag(name: str, default: bool = False) -> bool:
        value = values.get(name, default)
        if not isinstance(value, bool):
            raise OptionError(f"{name} must be true or false, got {shorten(value)}")
        return value

    sampling = SamplingOptions(
        temperature=number("temperature", options.temperature),
        top_p=number("top_p", options.top_p),
        top_k=max(0, whole("top_k", options.top_k, -1, 2**31 - 1)),  # -1 is off too, as for vLLM
        min_p=number("min_p", 0.0),
        repetition_penalty=number("repetition_penalty", options.repetition_penalty),
        presence_penalty=number("presence_penalty", 0.0),
        frequency_penalty=number("frequency_penalty", 0.0),
        logit_bias=_biases(values.get("logit_bias", {})),
        seed=whole("seed", 0, 0, 2**64 - 1) if "seed" in values else None,
    )
    max_tokens = whole("max_tokens", min(options.default_max_tokens, options.max_tokens), 1, options.max_tokens)
    session_id, start, end = None, flag("session_start"), flag("session_end")
    if "session_id" in values:
        session_id = _text("session_id", values["session_id"])
        if not SESSION_ID.fullmatch(session_id):
            raise OptionError(
                "session_id must be 1 to 128 letters, digits and characters of . _ : -, got " + shorten(session_id)
            )
    elif start or end:
        raise OptionError(f"{'session_start' if start else 'session_end'} needs a session_id")
    _check_size(values, options)
    videos = _files("video", values.get("video", []), options.max_videos)
    for name in ("video_fps", "max_frames"):
        if name in values and not videos:
            raise OptionError(f"{name} goes with video, got {shorten(values[name])}")
    messages, probe = _messages(values), flag("probe")
    chat = flag("chat", bool(messages))
    template = _template(values.get("chat_template_kwargs", {}))
    if (messages or template) and not chat:
        raise OptionError(f"{'messages' if messages else 'chat_template_kwargs'} needs chat to be true")
    return GenerateRequest(
        text=_prompt(values, may_be_empty=bool(messages) or probe or (end and not start)),
        max_tokens=max_tokens,
        sampling=sampling,
        min_tokens=whole("min_tokens", 0, 0, max_tokens),
        end_id=whole("end_id", -1, -1, MAX_TOKEN_ID) if "end_id" in values else None,
        ignore_eos=flag("ignore_eos"),
        stop_token_ids=_stop_tokens(values.get("stop_token_ids", [])),
        stop_words=_stop_words(values.get("stop_words", [])),
        images=_files("image", values.get("image", []), options.max_images),
        videos=videos,
        video_fps=number("video_fps", 0) if "video_fps" in values else None,
        max_frames=whole("max_frames", 0, 2, MAX_COUNT) if "max_frames" in values else None,
        chat=chat,
        literal=flag("literal"),
        messages=messages,
        template=template,
        stream=flag("stream"),
        echo=not flag("exclude_input_in_output", default=True),
        return_num_input_tokens=flag("return_num_input_tokens"),
        return_num_output_tokens=flag("return_num_output_tokens"),
        session_id=session_id,
        session_start=start,
        session_end=end,
        probe=probe,
    )


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise OptionError(f"{name} must be a number, got {shorten(value)}")
    try:
        return float(value)
    except OverflowError:  # JSON has whole numbers of any length
        raise OptionError(f"{name} is too large, got {shorten(value)}") from None


def _text(name: str, value: Any) -> str:
    if isinstance(value, bytes):
        value = decode_text(value, name)
    if not isinstance(value, str):
        raise OptionError(f"{name} must be text, got {shorten(value)}")
    return value


def _json(name: str, raw: Any, kind: type[T], most: int | None = None) -> T:
    """A value that is JSON in a text, or was within JSON."""
    what = "object" if kind is dict else "list"
    value = raw
    if isinstance(raw, bytes | str):
        if most is not None and len(raw) > most:
            raise OptionError(f"{name} has {len(raw):,} bytes; at most {most:,} are read")
        try:
            value = json.loads(_text(name, raw))
        except (ValueError, RecursionError) as error:
            raise OptionError(f"{name} must be a JSON {what}: {str(error)[:100]}") from None
    if _is_deep(value):
        raise OptionError(f"{name} must be a JSON {what} of at most {MAX_DEPTH} levels")
    if not isinstance(value, kind):
        raise OptionError(f"{name} must be a JSON {what}, got {shorten(value)}")
    return value


def _is_deep(value: Any) -> bool:
    """Whether JSON has more than MAX_DEPTH levels; what reads it further calls itself for each."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for part in level
            if isinstance(part, dict | list)
            for item in (part.values() if isinstance(part, dict) else part)
        ]
        if not level:
            return False
    return True


def _biases(found: Any) -> dict[int, float]:
    biases = {}
    for name, bias in _json("logit_bias", found, dict, MAX_JSON_BYTES).items():
        token = int(name) if isinstance(name, str) and name.isascii() and name.isdigit() and len(name) < 11 else -1
        if not 0 <= token <= MAX_TOKEN_ID or str(token) != name:
            raise OptionError(f"logit_bias has token ids as keys, got {shorten(name)}")
        biases[token] = _number(f"logit_bias of {token}", bias)
    if len(biases) > MAX_BIASES:
        raise OptionError(f"logit_bias takes at most {MAX_BIASES} tokens, got {len(biases)}")
    return biases


def _stop_tokens(found: Any) -> tuple[int, ...]:
    listed = _json("stop_token_ids", found, list, MAX_JSON_BYTES)
    if len(listed) > MAX_STOP_TOKENS:
        raise OptionError(f"stop_token_ids takes at most {MAX_STOP_TOKENS} tokens, got {len(listed)}")
    return tuple(require_whole("stop_token_ids", token, 0, MAX_TOKEN_ID) for token in listed)


def _template(found: Any) -> dict[str, Any]:
    variables = _json("chat_template_kwargs", found, dict)
    for name in variables:
        if not (isinstance(name, str) and name.isidentifier()) or name.startswith("_"):
            raise OptionError(f"chat_template_kwargs has names of variables as keys, got {shorten(name)}")
        if name in RESERVED:
            raise OptionError(f"chat_template_kwargs must leave {name} to the server")
    return variables


def _messages(values: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    found = _json("messages", values.get("messages", []), list)
    if len(found) > MAX_MESSAGES:
        raise OptionError(f"messages takes at most {MAX_MESSAGES} messages, got {len(found)}")
    if "messages" in values and not found:
        raise OptionError("messages is empty; give a message, or leave it out")
    for index, message in enumerate(found, 1):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or not role:
            raise OptionError(f"message {index} must be an object with a role, got {shorten(message)}")
        content = message.get("content")
        for part in content if isinstance(content, list) else []:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in ("image", "video") and not (kind == "text" and isinstance(part.get("text"), str)):
                raise OptionError(
                    f"message {index}: a part of its content must be a text, an image or a video, whose files are in "
                    f"the inputs image and video, got {shorten(part)}"
                )
        if not isinstance(content, str | list) and (content is not None or len(message) < 2):
            raise OptionError(f"message {index} must have a text or a list of parts as content, got {shorten(content)}")
    return tuple(found)


def _check_size(values: Mapping[str, Any], options: ServingOptions) -> None:
    names = ("text_input", "messages", "chat_template_kwargs")
    sizes = {name: len(value) for name in names if isinstance(value := values.get(name), bytes | str)}
    if (total := sum(sizes.values())) > options.max_prompt_bytes:
        raise OptionError(
            f"{max(sizes, key=lambda name: sizes[name])} has {max(sizes.values()):,} bytes, and this model takes at "
            f"most {options.max_prompt_bytes:,} (max_prompt_bytes); the texts of this request have {total:,} together"
        )


def _prompt(values: Mapping[str, Any], *, may_be_empty: bool) -> str:
    if "text_input" not in values:
        raise OptionError("text_input is missing; give the prompt")
    text = _text("text_input", values["text_input"])
    if not text and not may_be_empty:
        raise OptionError("text_input is empty; give a prompt")
    return text


def _check_list(name: str, found: Any) -> None:
    if not isinstance(found, list):
        raise OptionError(f"{name} must be a list, got {shorten(found)}")


def _stop_words(found: Any) -> tuple[str, ...]:
    _check_list("stop_words", found)
    words = tuple(_text("stop_words", word) for word in found)
    words = tuple(word for word in words if word)  # an empty one is how clients fill a fixed shape
    if len(words) > MAX_STOP_WORDS:
        raise OptionError(f"stop_words takes at most {MAX_STOP_WORDS} texts, got {len(words)}")
    for word in words:
        if len(word) > MAX_STOP_WORD_CHARS:
            raise OptionError(f"a stop word has at most {MAX_STOP_WORD_CHARS} characters, got {len(word)}")
    return words


def _files(name: str, found: Any, most: int) -> tuple[bytes, ...]:
    _check_list(name, found)
    if len(found) > most:
        raise OptionError(f"{name} takes at most {most} {name}s, got {len(found)} (max_{name}s)")
    for index, value in enumerate(found, 1):
        if not isinstance(value, bytes | str):
            raise OptionError(f"{name} {index} must be bytes or base64, got {shorten(value)}")
    return tuple(value.encode(errors="replace") if isinstance(value, str) else value for value in found)


def media_file(kind: str, index: int, raw: bytes, limit: int) -> bytes:
    """The bytes of a file that was sent as it is, or as base64, also in a data URL.

    Files are never ASCII all through.

    Args:
        kind: "image" or "video".
        index: of the image, or the video, in its request, from 1.
        raw: what was sent.
        limit: the most bytes that the file may have.

    Raises:
        OptionError: it is something else, empty, or larger.
    """
    if raw.isascii():
        prefix = DATA_URL.match(raw)
        if prefix is None and URL.match(raw):
            raise OptionError(
                f"{kind} {index} is a URL, {shorten(raw[:80].decode())}; send the file itself, or its base64, also as "
                f"data:{'image/png' if kind == 'image' else 'video/mp4'};base64,…"
            )
        raw = _from_base64(f"{kind} {index}", kind, raw[prefix.end() :] if prefix else raw, limit)
    if not 0 < len(raw) <= limit:
        raise OptionError(f"{kind} {index} must have 1 to {limit:,} bytes (max_{kind}_bytes), got {len(raw):,}")
    return raw


def _from_base64(name: str, kind: str, data: bytes, limit: int) -> bytes:
    found, rest, padded = bytearray(), b"", False
    for start in range(0, len(data), PIECE):
        piece = rest + data[start : start + PIECE].translate(None, WHITESPACE)
        last = start + PIECE >= len(data)
        end = len(piece) if last else len(piece) - len(piece) % 4
        try:
            if padded and piece:
                raise binascii.Error("data after its padding")
            found += base64.b64decode(piece[:end], validate=True)
        except binascii.Error as error:
            article = "an" if kind == "image" else "a"
            raise OptionError(f"{name} is neither {article} {kind} file nor base64 of one: {error}") from None
        rest, padded = piece[end:], padded or piece[:end].endswith(b"=")
        if len(found) > limit:
            break
    return bytes(found)
