"""The fields of a request: one table for config.pbtxt and for their validation."""

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from numpy.typing import NDArray

from trimkv_export.checks import require_whole
from trimkv_export.errors import OptionError
from trimkv_export.files import decode_text
from trimkv_export.serving.options import ServingOptions
from trimkv_export.serving.replies import RequestError
from trimkv_export.text.sampling import SamplingOptions
from trimkv_export.words import shorten

__all__ = ["INPUTS", "OUTPUTS", "Field", "GenerateRequest", "parse_request", "read_tensors"]

MAX_STOP_WORDS, MAX_STOP_WORD_CHARS = 16, 256
SESSION_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
DATA_URL = re.compile(r"data:image/[A-Za-z0-9.+-]+;base64,")


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
    Field("stop_words", "STRING", many=True),
    Field("image", "STRING", many=True),
    Field("chat", "BOOL"),
    Field("exclude_input_in_output", "BOOL"),
    Field("return_num_input_tokens", "BOOL"),
    Field("return_num_output_tokens", "BOOL"),
    Field("session_id", "STRING"),
    Field("session_start", "BOOL"),
    Field("session_end", "BOOL"),
    Field("sampling_parameters", "STRING"),
)
OUTPUTS = (
    Field("text_output", "STRING"),
    Field("finish_reason", "STRING"),
    Field("num_input_tokens", "UINT32"),
    Field("num_output_tokens", "UINT32"),
)
BY_NAME = {entry.name: entry for entry in INPUTS}
# In sampling_parameters and in the request's parameters: single values that choose tokens. "stop" is vLLM's name.
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
    "stop",
)
NUMPY_KINDS = {"STRING": "OSU", "BOOL": "b", "INT32": "iu", "UINT64": "iu", "FP32": "f"}


@dataclass(frozen=True)
class GenerateRequest:
    """A request whose fields were checked.

    Attributes:
        text: the prompt, or with `chat` the user's message.
        max_tokens: the longest answer.
        sampling: how tokens are chosen.
        min_tokens: before so many tokens, none ends the text.
        end_id: ends the text in place of the tokenizer's end tokens; -1: nothing does.
        stop_words: texts that end the answer; they are not part of it.
        images: encoded, as files hold them.
        chat: `text` goes into the model's chat template.
        stream: tokens are sent as they are chosen.
        echo: the prompt's text is part of the answer.
        return_num_input_tokens: the answer says how many tokens the prompt has.
        return_num_output_tokens: the answer says how many tokens it has.
        session_id: the conversation to go on with, or to begin.
        session_start: begin the conversation.
        session_end: forget the conversation afterwards.
    """

    text: str
    max_tokens: int = 256
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    min_tokens: int = 0
    end_id: int | None = None
    stop_words: tuple[str, ...] = ()
    images: tuple[bytes, ...] = ()
    chat: bool = False
    stream: bool = False
    echo: bool = False
    return_num_input_tokens: bool = False
    return_num_output_tokens: bool = False
    session_id: str | None = None
    session_start: bool = False
    session_end: bool = False


def read_tensors(tensors: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """Python values of input tensors: str, bool, int or float, lists of bytes for what may have many values.

    Text becomes bytes here; `parse_request` decodes it.

    Raises:
        RequestError: a tensor is not known, or has the wrong type or size.
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
        options: of the served model.
        parameters: the request's own, with the fields of `sampling_parameters`; what Triton's front ends add for
            themselves (triton_…) is left aside.

    Raises:
        RequestError: a bad value; the message names the field and quotes the value.
    """
    try:
        merged = _merge(values, parameters or {})
        return _parse(merged, options)
    except OptionError as error:
        raise RequestError("invalid", str(error)) from None


def _merge(values: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    outer = {name: value for name, value in parameters.items() if not name.startswith("triton_")}
    inner = {}
    if (raw := values.get("sampling_parameters")) is not None:
        try:
            inner = json.loads(_text("sampling_parameters", raw))
        except (ValueError, RecursionError) as error:
            raise OptionError(f"sampling_parameters must be a JSON object: {error}") from None
        if not isinstance(inner, dict):
            raise OptionError(f"sampling_parameters must be a JSON object, got {shorten(inner)}")
    for where, found in (("parameter", outer), ("sampling parameter", inner)):
        if unknown := sorted(set(found) - set(PARAMETERS)):
            raise OptionError(f"unknown {where} {shorten(unknown[0])}; known are {', '.join(PARAMETERS)}")
    merged = {**outer, **inner}
    if "stop" in merged:
        stop = merged.pop("stop")
        merged["stop_words"] = stop if isinstance(stop, list) else [stop]
    return {**merged, **values}


def _parse(values: Mapping[str, Any], options: ServingOptions) -> GenerateRequest:
    def whole(name: str, default: int, low: int, high: int) -> int:
        return require_whole(name, values.get(name, default), low, high)

    def number(name: str, default: float) -> float:
        value = values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise OptionError(f"{name} must be a number, got {shorten(value)}")
        return value  # SamplingOptions knows the range

    def flag(name: str, default: bool) -> bool:
        value = values.get(name, default)
        if not isinstance(value, bool):
            raise OptionError(f"{name} must be true or false, got {shorten(value)}")
        return value

    for name in ("presence_penalty", "frequency_penalty"):  # Triton's OpenAI front end always sends them
        if number(name, 0.0) != 0.0:
            raise OptionError(
                f"{name} is not supported, got {shorten(values[name])}; leave it out, or use repetition_penalty"
            )
    sampling = SamplingOptions(
        temperature=number("temperature", options.temperature),
        top_p=number("top_p", options.top_p),
        top_k=whole("top_k", options.top_k, 0, 2**31 - 1),
        min_p=number("min_p", 0.0),
        repetition_penalty=number("repetition_penalty", options.repetition_penalty),
        seed=whole("seed", 0, 0, 2**64 - 1) if "seed" in values else None,
    )
    max_tokens = whole("max_tokens", min(options.default_max_tokens, options.max_tokens), 1, options.max_tokens)
    session_id, start, end = None, flag("session_start", False), flag("session_end", False)
    if "session_id" in values:
        session_id = _text("session_id", values["session_id"])
        if not SESSION_ID.fullmatch(session_id):
            raise OptionError(
                "session_id must be 1 to 128 letters, digits and characters of . _ : -, got " + shorten(session_id)
            )
    elif start or end:
        raise OptionError(f"{'session_start' if start else 'session_end'} needs a session_id")
    return GenerateRequest(
        text=_prompt(values, options, may_be_empty=end and not start),
        max_tokens=max_tokens,
        sampling=sampling,
        min_tokens=whole("min_tokens", 0, 0, max_tokens),
        end_id=whole("end_id", -1, -1, 2**31 - 1) if "end_id" in values else None,
        stop_words=_stop_words(values.get("stop_words", [])),
        images=_images(values.get("image", []), options),
        chat=flag("chat", False),
        stream=flag("stream", False),
        echo=not flag("exclude_input_in_output", True),
        return_num_input_tokens=flag("return_num_input_tokens", False),
        return_num_output_tokens=flag("return_num_output_tokens", False),
        session_id=session_id,
        session_start=start,
        session_end=end,
    )


def _text(name: str, value: Any) -> str:
    if isinstance(value, bytes):
        value = decode_text(value, name)
    if not isinstance(value, str):
        raise OptionError(f"{name} must be text, got {shorten(value)}")
    return value


def _prompt(values: Mapping[str, Any], options: ServingOptions, *, may_be_empty: bool) -> str:
    if "text_input" not in values:
        raise OptionError("text_input is missing; give the prompt")
    raw = values["text_input"]
    if isinstance(raw, bytes | str) and len(raw) > options.max_prompt_bytes:
        raise OptionError(
            f"text_input has {len(raw):,} bytes, and this model takes at most {options.max_prompt_bytes:,} "
            "(max_prompt_bytes)"
        )
    text = _text("text_input", raw)
    if not text and not may_be_empty:
        raise OptionError("text_input is empty; give a prompt")
    return text


def _stop_words(found: list[Any]) -> tuple[str, ...]:
    words = tuple(_text("stop_words", word) for word in found)
    words = tuple(word for word in words if word)  # an empty one is how clients fill a fixed shape
    if len(words) > MAX_STOP_WORDS:
        raise OptionError(f"stop_words takes at most {MAX_STOP_WORDS} texts, got {len(words)}")
    for word in words:
        if len(word) > MAX_STOP_WORD_CHARS:
            raise OptionError(f"a stop word has at most {MAX_STOP_WORD_CHARS} characters, got {len(word)}")
    return words


def _images(found: list[Any], options: ServingOptions) -> tuple[bytes, ...]:
    if len(found) > options.max_images:
        raise OptionError(f"image takes at most {options.max_images} images, got {len(found)}")
    return tuple(_image(index, value, options.max_image_bytes) for index, value in enumerate(found, 1))


def _image(index: int, value: Any, limit: int) -> bytes:
    """The bytes of an image file: given so, or as base64, also in a data URL. Files are never ASCII all through."""
    raw = value.encode() if isinstance(value, str) else bytes(value)
    if raw.isascii():
        text = raw.decode()
        if prefix := DATA_URL.match(text):
            text = text[prefix.end() :]
        try:
            raw = base64.b64decode("".join(text.split()), validate=True)
        except binascii.Error as error:
            raise OptionError(f"image {index} is neither an image file nor base64 of one: {error}") from None
    if not 0 < len(raw) <= limit:
        raise OptionError(f"image {index} must have 1 to {limit:,} bytes (max_image_bytes), got {len(raw):,}")
    return raw
