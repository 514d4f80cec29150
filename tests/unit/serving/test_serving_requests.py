"""The fields of a request: what is taken, and a clear error for all else."""

import base64
import json
from typing import Any

import numpy as np
import pytest

from trimkv_export.errors import OptionError
from trimkv_export.serving import GenerateRequest, RequestError, ServingOptions
from trimkv_export.serving.requests import INPUTS, media_file, parse_request, read_tensors

OPTIONS = ServingOptions(max_prompt_bytes=1 << 20, max_tokens=100, default_max_tokens=10, max_image_bytes=1000)
PNG = b"\x89PNG\r\n\x1a\n and so on"


def parse(parameters: dict[str, Any] | None = None, **values: Any) -> GenerateRequest:
    return parse_request({"text_input": b"hello"} | values, OPTIONS, parameters)


def tensor(value: Any, dtype: Any) -> Any:
    return np.array([[value]], dtype)


def test_a_request_of_text_alone_has_the_defaults_of_the_options() -> None:
    request = parse()
    assert request == GenerateRequest("hello", max_tokens=10)
    chosen = ServingOptions(temperature=0.5, top_k=3)
    assert parse_request({"text_input": b"x"}, chosen).sampling.top_k == 3


def test_every_field_arrives() -> None:
    values = read_tensors(
        {
            "text_input": np.array([["grüß".encode()]], np.object_),
            "max_tokens": tensor(7, np.int32),
            "temperature": tensor(0.5, np.float32),
            "top_p": tensor(0.25, np.float32),
            "top_k": tensor(3, np.int32),
            "repetition_penalty": tensor(1.5, np.float32),
            "frequency_penalty": tensor(0, np.float32),
            "seed": tensor(2**64 - 1, np.uint64),
            "stop_words": np.array([[b"a", b"", b"b"]], np.object_),
            "image": np.array([[base64.b64encode(PNG), PNG]], np.object_),
            "stream": tensor(True, np.bool_),
            "exclude_input_in_output": tensor(False, np.bool_),
            "session_id": np.array([[b"user-1"]], np.object_),
            "session_start": tensor(True, np.bool_),
        }
    )
    request = parse_request(values, OPTIONS)
    assert (request.text, request.max_tokens, request.stop_words) == ("grüß", 7, ("a", "b"))
    assert [media_file("image", 1, raw, 1000) for raw in request.images] == [PNG, PNG]
    assert (request.stream, request.echo) == (True, True)
    assert (request.session_id, request.session_start, request.session_end) == ("user-1", True, False)
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.25, 3, 2**64 - 1)


def test_inputs_win_over_sampling_parameters_over_the_requests_own() -> None:
    inner = json.dumps({"temperature": 0.5, "top_k": 5, "stop": "x"})
    request = parse(
        {"temperature": 0.1, "top_k": 1, "seed": 4, "triton_enable_empty_final_response": True},
        sampling_parameters=inner.encode(),
        top_k=9,
    )
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed, request.stop_words) == (0.5, 9, 4, ("x",))


@pytest.mark.parametrize(
    "head",
    [
        "",
        "data:image/png;base64,",
        "data:image/svg+xml;base64,",
        "data:;base64,",
        "DATA:image/PNG;BASE64,",
        "data:image/png;charset=utf-8;base64,",
        "data:image/jpeg;name=holiday.jpg;charset=utf-8;base64,",
    ],
)
def test_base64_in_lines_also_in_a_data_url(head: str) -> None:
    (raw,) = parse(image=[head + base64.encodebytes(PNG).decode()]).images
    assert media_file("image", 1, raw, 1000) == PNG


def test_long_base64_is_decoded_in_pieces() -> None:
    for extra in range(4):
        file = bytes([0x89]) + bytes(range(256)) * 9000 + bytes(extra)
        for text in (base64.b64encode(file), base64.encodebytes(file)):
            assert media_file("image", 1, text, 1 << 24) == file


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"not base64!", "image 2 is neither"),
        (b"QQ=", "image 2 is neither"),
        (b"QQ==QQ==", "image 2 is neither"),
        (b"QUFB" * 100 + b"QQ==" + b"QUFB", "image 2 is neither"),
        (b"", "image 2 must have 1 to"),
        (b"  ", "image 2 must have 1 to"),
        (b"data:image/png;base64,", "image 2 must have 1 to"),
        (b"\x89" * 1001, "image 2 must have 1 to 1,000 bytes"),
        (b"QUFB" * 1000, "image 2 must have 1 to 1,000 bytes"),
        (b"https://example.com/cat.png", "image 2 is a URL.*send the file itself"),
        (b"file:///etc/passwd", "image 2 is a URL"),
        (b"data:image/png,%89PNG", "image 2 is a URL"),
    ],
)
def test_what_is_no_image_file(raw: bytes, message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        media_file("image", 2, raw, 1000)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text_input": b""}, "text_input is empty"),
        ({"text_input": b"\xff\xfe"}, "text_input: is not UTF-8 text: byte 0xff at 0"),
        ({"text_input": 5}, "text_input must be text, got 5"),
        ({"text_input": b"x" * ((1 << 20) + 1)}, "text_input has 1,048,577 bytes.*max_prompt_bytes"),
        ({"max_tokens": 0}, "max_tokens must be a whole number from 1 to 100, got 0"),
        ({"max_tokens": -5}, "max_tokens .* got -5"),
        ({"max_tokens": 101}, "max_tokens .* got 101"),
        ({"max_tokens": True}, "max_tokens .* got True"),
        ({"max_tokens": 1.5}, "max_tokens .* got 1.5"),
        ({"min_tokens": -1}, "min_tokens .* got -1"),
        ({"min_tokens": 11}, "min_tokens must be a whole number from 0 to 10, got 11"),
        ({"temperature": float("nan")}, "temperature .* got nan"),
        ({"temperature": float("inf")}, "temperature .* got inf"),
        ({"temperature": -0.5}, "temperature .* got -0.5"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"top_p": 1.5}, "top_p .* got 1.5"),
        ({"top_p": -0.1}, "top_p .* got -0.1"),
        ({"top_p": float("nan")}, "top_p .* got nan"),
        ({"min_p": 2.0}, "min_p .* got 2.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty .* got 0.0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty .* got -1.0"),
        ({"seed": -1}, "seed .* got -1"),
        ({"end_id": -2}, "end_id .* got -2"),
        ({"stop_words": [b"\xff"]}, "stop_words: is not UTF-8 text: byte 0xff at 0"),
        ({"stop_words": [b"x"] * 17}, "at most 16 texts, got 17"),
        ({"stop_words": [b"x" * 257]}, "at most 256 characters, got 257"),
        ({"image": [PNG] * 17}, "at most 16 images, got 17"),
        ({"session_id": b""}, "session_id must be"),
        ({"session_id": b"x" * 129}, "session_id must be"),
        ({"session_id": b"../../etc/passwd"}, "session_id must be"),
        ({"session_id": "line\n"}, "session_id must be"),
        ({"session_start": True}, "session_start needs a session_id"),
        ({"session_end": True}, "session_end needs a session_id"),
        ({"session_id": b"a", "session_start": True, "session_end": True, "text_input": b""}, "text_input is empty"),
        ({"stream": 1}, "stream must be true or false, got 1"),
        ({"sampling_parameters": b"{"}, "sampling_parameters must be a JSON object"),
        ({"sampling_parameters": b"[1]"}, r"sampling_parameters must be a JSON object, got \[1\]"),
        ({"sampling_parameters": b"[" * 100_000}, "sampling_parameters must be a JSON object"),
        ({"sampling_parameters": b'{"temprature": 1}'}, "unknown sampling parameter 'temprature'"),
        ({"sampling_parameters": b'{"temperature": NaN}'}, "temperature .* got nan"),
        ({"sampling_parameters": b'{"max_tokens": "5"}'}, "max_tokens .* got '5'"),
        ({"sampling_parameters": b'{"stop": [1]}'}, "stop_words must be text, got 1"),
        ({"sampling_parameters": b'{"stop": {}}'}, "stop_words must be text, got {}"),
        ({"sampling_parameters": b'{"seed": ' + b"[" * 40 + b"]" * 40 + b"}"}, "at most 32 levels"),
        ({"sampling_parameters": b'{"seed": ' + b"9" * 400 + b"}"}, "seed .* got 9999"),
        ({"sampling_parameters": b'{"top_p": ' + b"9" * 400 + b"}"}, "top_p is too large"),
        ({"sampling_parameters": b'{"top_p": ' + b"9" * 5000 + b"}"}, "sampling_parameters must be a JSON object"),
        ({"sampling_parameters": b" " * 300_000}, "sampling_parameters has 300,000 bytes"),
        ({"top_k": -2}, "top_k .* got -2"),
        ({"presence_penalty": 3.0}, "presence_penalty .* got 3.0"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty .* got nan"),
        ({"stop_token_ids": [-1]}, "stop_token_ids .* got -1"),
        ({"stop_token_ids": [1] * 257}, "at most 256 tokens, got 257"),
        ({"sampling_parameters": b'{"stop_token_ids": 5}'}, "stop_token_ids must be a JSON list, got 5"),
        ({"sampling_parameters": b'{"stop_token_ids": ["5"]}'}, "stop_token_ids .* got '5'"),
        ({"logit_bias": b"[1]"}, "logit_bias must be a JSON object"),
        ({"logit_bias": b'{"-1": 1}'}, "logit_bias has token ids as keys, got '-1'"),
        ({"logit_bias": b'{"hello": 1}'}, "logit_bias has token ids as keys, got 'hello'"),
        ({"logit_bias": b'{"05": 1}'}, "logit_bias has token ids as keys, got '05'"),
        ({"logit_bias": b'{"5": "a"}'}, "logit_bias of 5 must be a number, got 'a'"),
        ({"messages": b"{}"}, "messages must be a JSON list"),
        ({"messages": b"[]"}, "messages is empty"),
        ({"messages": b"[1]"}, "message 1 must be an object with a role, got 1"),
        ({"messages": b'[{"role": "user"}]'}, "message 1 must have a text"),
        ({"messages": b'[{"role": "user", "content": 5}]'}, "message 1 must have a text .* got 5"),
        ({"messages": b'[{"role": "user", "content": [{"type": "image_url"}]}]'}, "message 1: a part of its content"),
        ({"messages": b'[{"role": "user", "content": "x"}]', "chat": False}, "messages needs chat"),
        ({"messages": b"x" * (1 << 20)}, "messages has 1,048,576 bytes.*max_prompt_bytes"),
        ({"messages": b'[{"role": "user", "content": "x"}' + b"," * 9}, "messages must be a JSON list"),
        ({"chat_template_kwargs": b'{"a": 1}'}, "chat_template_kwargs needs chat"),
        ({"chat_template_kwargs": b'{"messages": 1}', "chat": True}, "must leave messages to the server"),
        ({"chat_template_kwargs": b'{"_a": 1}', "chat": True}, "names of variables as keys, got '_a'"),
        ({"chat_template_kwargs": b'{"a b": 1}', "chat": True}, "names of variables as keys, got 'a b'"),
    ],
)
def test_bad_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        parse(**values)
    assert caught.value.kind == "invalid"
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("raw", [b"QUFB" * (1 << 18) + b"QQ==" + b"QUFB" * (1 << 18), b"QQ==" * (1 << 19)])
def test_padding_between_the_pieces_of_base64(raw: bytes) -> None:
    with pytest.raises(OptionError, match="image 1 is neither"):
        media_file("image", 1, raw, 1 << 24)


def test_off_is_written_in_several_ways() -> None:
    nothing: dict[str, Any] = dict.fromkeys(
        ["temperature", "top_k", "seed", "stop", "logit_bias", "stop_token_ids", "max_tokens"]
    )
    assert parse(sampling_parameters=json.dumps(nothing).encode()) == parse()
    assert parse(nothing) == parse()
    assert parse(top_k=-1) == parse(top_k=0) == parse(sampling_parameters=b'{"top_k": -1}') == parse()
    assert parse({"top_k": 7}, sampling_parameters=b'{"top_k": null}').sampling.top_k == 7


def test_penalties_biases_and_ends() -> None:
    fields: dict[str, Any] = {
        "presence_penalty": 0.5,
        "frequency_penalty": -1,
        "ignore_eos": True,
        "stop_token_ids": [1, 2],
    }
    inner = parse(sampling_parameters=json.dumps(fields | {"logit_bias": {"3": -100, "0": 2.5}}).encode())
    outer = parse(**fields, logit_bias=b'{"3": -100, "0": 2.5}')
    for request in (inner, outer):
        sampling = request.sampling
        assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -1.0)
        assert sampling.logit_bias == {0: 2.5, 3: -100.0}
        assert (request.ignore_eos, request.stop_token_ids) == (True, (1, 2))


def test_messages_and_variables_of_the_template() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
    ]
    request = parse(
        messages=json.dumps(messages).encode(), text_input=b"", chat_template_kwargs=b'{"tools": [], "a": 1}'
    )
    assert (request.chat, request.text, list(request.messages)) == (True, "", messages)
    assert request.template == {"tools": [], "a": 1}
    assert parse(chat=True, sampling_parameters=b'{"chat_template_kwargs": {"enable_thinking": false}}').template == {
        "enable_thinking": False
    }


def test_no_prompt_and_unknown_parameters() -> None:
    with pytest.raises(RequestError, match="text_input is missing"):
        parse_request({}, OPTIONS)
    with pytest.raises(RequestError, match="unknown parameter 'max_token'"):
        parse({"max_token": 5})


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("max_tokens", np.array([["5"]], np.object_), "max_tokens must be of type INT32, got object"),
        ("temperature", np.array([[1]], np.int32), "temperature must be of type FP32, got int32"),
        ("text_input", np.array([[5]], np.int32), "text_input must be of type STRING"),
        ("stream", np.array([[1]], np.int32), "stream must be of type BOOL"),
        ("max_tokens", np.array([[1, 2]], np.int32), r"max_tokens must be one value, got 2 in shape \[1, 2\]"),
        ("seed", np.zeros((1, 0), np.uint64), r"seed must be one value, got 0 in shape \[1, 0\]"),
        ("prompt", np.array([["x"]], np.object_), "unknown input 'prompt'"),
    ],
)
def test_tensors_of_the_wrong_kind(name: str, array: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_tensors({name: array})


def test_options_go_through_text_and_back() -> None:
    options = ServingOptions(provider="cuda", temperature=0.5, timeout=3, max_sequences=2, exit_on_failure=True)
    assert ServingOptions.from_parameters(options.parameters()) == options


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"max_sequences": "0"}, "max_sequences .* got 0"),
        ({"max_sequences": "four"}, "max_sequences must be a whole number, got 'four'"),
        ({"temperature": "nan"}, "temperature .* got nan"),
        ({"timeout": "-1"}, "timeout .* got -1"),
        ({"exit_on_failure": "1"}, "exit_on_failure must be true or false, got '1'"),
        ({"reader_threads": "300"}, "reader_threads must be a whole number from 1 to 256, got 300"),
        ({"provider": "tpu"}, "provider .* got 'tpu'"),
        ({"max_sequnces": "1"}, "unknown parameter 'max_sequnces'"),
        ({"max_tokens": "5", "default_max_tokens": "6"}, "default_max_tokens .* got 6"),
    ],
)
def test_bad_options(texts: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ServingOptions.from_parameters(texts)


def test_names_are_unique() -> None:
    assert len({entry.name for entry in INPUTS}) == len(INPUTS)
