"""The fields of a request: what is taken, and a clear error for all else."""

import base64
import json
from typing import Any

import numpy as np
import pytest

from trimkv_export.errors import OptionError
from trimkv_export.serving import GenerateRequest, RequestError, ServingOptions
from trimkv_export.serving.requests import INPUTS, parse_request, read_tensors

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
    assert request.images == (PNG, PNG)
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


def test_data_urls_and_base64_in_lines() -> None:
    text = base64.encodebytes(PNG).decode()
    assert parse(image=["data:image/png;base64," + text]).images == (PNG,)


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
        ({"top_k": -1}, "top_k .* got -1"),
        ({"min_p": 2.0}, "min_p .* got 2.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty .* got 0.0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty .* got -1.0"),
        ({"presence_penalty": 0.5}, "presence_penalty is not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is not supported"),
        ({"seed": -1}, "seed .* got -1"),
        ({"end_id": -2}, "end_id .* got -2"),
        ({"stop_words": [b"\xff"]}, "stop_words: is not UTF-8 text: byte 0xff at 0"),
        ({"stop_words": [b"x"] * 17}, "at most 16 texts, got 17"),
        ({"stop_words": [b"x" * 257]}, "at most 256 characters, got 257"),
        ({"image": [b"not base64!"]}, "image 1 is neither"),
        ({"image": [base64.b64encode(PNG), b"QQ="]}, "image 2 is neither"),
        ({"image": [b""]}, "image 1 must have 1 to"),
        ({"image": [b"\x89" * 1001]}, "image 1 must have 1 to 1,000 bytes"),
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
    ],
)
def test_bad_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        parse(**values)
    assert caught.value.kind == "invalid"
    assert len(str(caught.value)) < 300


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
    options = ServingOptions(provider="cuda", temperature=0.5, timeout=3, max_sequences=2)
    assert ServingOptions.from_parameters(options.parameters()) == options


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"max_sequences": "0"}, "max_sequences .* got 0"),
        ({"max_sequences": "four"}, "max_sequences must be a whole number, got 'four'"),
        ({"temperature": "nan"}, "temperature .* got nan"),
        ({"timeout": "-1"}, "timeout .* got -1"),
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
