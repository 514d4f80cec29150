"""A repository that `trimkv-export triton` wrote, on the real tritonserver: `make test-triton`."""

import base64
import concurrent.futures
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tritonclient", reason="needs a Triton: make test-triton")

from google.protobuf import text_format
from triton_server import MODEL, PATIENCE, ROOT, GrpcStream, TritonServer, wait_until, write_model
from tritonclient.grpc import model_config_pb2

from trimkv_export.runtime import Engine
from trimkv_export.runtime.prompts import encode_prompt
from trimkv_export.serving.requests import INPUTS, OUTPUTS
from trimkv_export.serving.triton.repository import config_pbtxt

ALPHABET = "abcdefghijklmnopqrstuvwxyz "


@pytest.fixture(scope="session")
def folder() -> Path:
    """What make_env.sh made."""
    return Path(os.environ.get("TRIMKV_TRITON", "build/triton")).absolute()


@pytest.fixture(scope="session")
def package(folder: Path) -> Path:
    return folder / "demo" / "package"


@pytest.fixture(scope="session")
def repository(folder: Path, package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("triton") / "repository"
    write_model(repository, package, folder / "model", queue_limit=600, max_tokens=2000)
    return repository


@pytest.fixture(scope="module")
def server(folder: Path, repository: Path) -> Iterator[TritonServer]:
    with TritonServer(folder, repository) as server:
        yield server


@pytest.fixture(scope="session")
def reference(package: Path) -> Iterator[Engine]:
    """An engine in this process, for single runs."""
    with Engine.open(package, threads=1) as engine:
        yield engine


def alone(engine: Engine, text: str, max_tokens: int) -> str:
    with engine.session() as session:
        tokens = list(session.generate(engine.tokenizer.encode(text), max_tokens))
    return engine.tokenizer.decode(tokens)


def random_text(rng: np.random.Generator, length: int) -> str:
    return "".join(rng.choice([*ALPHABET], length))


def test_config_is_what_tritons_own_schema_takes(repository: Path) -> None:
    text = (repository / MODEL / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert (config.name, config.backend, config.max_batch_size) == (MODEL, "python", 1)
    assert config.model_transaction_policy.decoupled
    assert [entry.name for entry in config.input] == [entry.name for entry in INPUTS]
    assert [entry.name for entry in config.input if not entry.optional] == ["text_input"]
    assert [entry.name for entry in config.output] == [entry.name for entry in OUTPUTS]
    odd = {"a": 'quote " and \\ and\nline and grüß'}
    config = text_format.Parse(config_pbtxt("x", "cuda", odd), model_config_pb2.ModelConfig())
    assert config.parameters["a"].string_value == odd["a"]
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU


def test_generate_in_one_piece_and_as_events(server: TritonServer, reference: Engine) -> None:
    expected = alone(reference, "hello", 20)
    status, body = server.generate("hello", max_tokens=20, return_num_input_tokens=True, return_num_output_tokens=True)
    assert status == 200
    assert body["text_output"] == expected
    assert (body["finish_reason"], body["num_input_tokens"], body["num_output_tokens"]) == ("length", 5, 20)
    events = list(server.events("hello", max_tokens=20, return_num_output_tokens=True))
    assert "".join(event["text_output"] for event in events) == expected
    assert sum(event["num_output_tokens"] for event in events) == 20
    # Tokens that are made while an event is under way share the next one.
    assert len([*server.events("hello", max_tokens=2000, end_id=-1)]) > 1
    status, body = server.generate("hello", max_tokens=3, parameters={"temperature": 0}, exclude_input_in_output=False)
    assert body["text_output"] == "hello" + alone(reference, "hello", 3)


def test_what_the_openai_front_end_sends(server: TritonServer) -> None:
    fields = {"max_tokens": 40, "stop_words": ["\n", "User:"], "top_p": 1.0, "temperature": 1.0, "seed": 7}
    fields |= {"frequency_penalty": 0.0, "presence_penalty": 0.0, "stream": False}
    with GrpcStream(server.grpc) as stream:
        stream.send("hello", **fields)
        responses = [outputs for _, outputs in stream.responses()]
        stream.send("hello", **fields)
        assert [outputs for _, outputs in stream.responses()] == responses
    assert len(responses) == 1
    assert "\n" not in responses[0]["text_output"]


def test_16_streams_equal_single_runs(server: TritonServer, reference: Engine) -> None:
    rng = np.random.default_rng(0)
    work = [
        (random_text(rng, int(rng.choice([3, 40, 300, 1500]))), int(rng.choice([5, 30, 100, 200]))) for _ in range(48)
    ]

    def ask(part: list[tuple[str, int]]) -> list[str]:
        with GrpcStream(server.grpc) as stream:
            return [stream.ask(text, max_tokens=length) for text, length in part]

    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # rows are used three times, each time by other texts
        found = list(pool.map(ask, [work[index::16] for index in range(16)]))
    for index, answers in enumerate(found):
        for (text, length), answer in zip(work[index::16], answers, strict=True):
            assert answer == alone(reference, text, length)
    server.wait_idle()
    assert server.metric("requests_failed") == 0


def test_every_way_to_go_away_frees_the_row(server: TritonServer) -> None:
    server.wait_idle()
    before = server.metric("requests_cancelled")
    with GrpcStream(server.grpc) as stream:  # left in the middle
        stream.send("one", max_tokens=2000, end_id=-1)
        next(stream.responses())
    events = server.events("two", max_tokens=2000, end_id=-1)
    next(events)
    events.close()
    server.wait_metric("requests_cancelled", before + 2)
    server.wait_idle()


def test_conversations(server: TritonServer, reference: Engine) -> None:
    with reference.session() as session:
        encode, decode = reference.tokenizer.encode, reference.tokenizer.decode
        first = list(session.generate(encode("tell me"), 10))
        second = list(session.generate([*first[-1:], *encode("go on")], 10))
    turn = {"session_id": "user-1", "max_tokens": 10}
    assert server.generate("tell me", session_start=True, **turn)[1]["text_output"] == decode(first)
    assert server.generate("tell me", session_start=True, session_id="user-2", max_tokens=10)[0] == 200
    with GrpcStream(server.grpc) as stream:
        assert stream.ask("go on", **turn) == decode(second)
    assert server.generate("", session_id="user-2", session_end=True)[0] == 200
    assert server.generate("", session_id="user-1", session_end=True)[0] == 200
    status, body = server.generate("go on", **turn)
    assert status == 400  # so Triton 24.10 says for any error
    assert "no session 'user-1'" in body["error"]


def raw(inputs: list[dict[str, Any]]) -> bytes:
    return json.dumps({"inputs": inputs}).encode()


TEXT = {"name": "text_input", "shape": [1, 1], "datatype": "BYTES", "data": ["hi"]}
BAD_FIELDS: list[dict[str, Any]] = [
    {"max_tokens": 0},
    {"max_tokens": -1},
    {"max_tokens": 2001},
    {"max_tokens": 2**31 - 1},
    {"max_tokens": "5"},
    {"max_tokens": 1.5},
    {"max_tokens": [1, 2]},
    {"max_tokens": None},
    {"min_tokens": -1},
    {"min_tokens": 300},
    {"temperature": -1.0},
    {"temperature": 1e30},
    {"temperature": "warm"},
    {"top_p": 1.01},
    {"top_p": -1.0},
    {"top_k": -2},
    {"min_p": 1.5},
    {"repetition_penalty": 0.0},
    {"repetition_penalty": -2.0},
    {"presence_penalty": 3.0},
    {"frequency_penalty": -3.0},
    {"logit_bias": "[]"},
    {"logit_bias": '{"1000000": 1}'},
    {"stop_token_ids": [-1]},
    {"messages": "{}"},
    {"chat_template_kwargs": '{"a": 1}'},
    {"chat_template_kwargs": '{"a": 1}', "chat": True},
    {"probe": "yes"},
    {"end_id": -7},
    {"stop_words": ["x"] * 17},
    {"stop_words": ["x" * 300]},
    {"stop_words": [5]},
    {"image": ["%%%"]},
    {"image": ["aGVsbG8="]},
    {"stream": "yes"},
    {"session_id": ""},
    {"session_id": "a b"},
    {"session_id": "x" * 200},
    {"session_id": "unknown"},
    {"session_end": True},
    {"session_start": True},
    {"chat": "no"},
    {"sampling_parameters": "{"},
    {"sampling_parameters": '{"temperature": NaN}'},
    {"sampling_parameters": '{"hotness": 1}'},
    {"parameters": {"max_tokns": 1}},
    {"text_input": ""},
    {"text_input": 5},
    {"text_input": ["a", "b"]},
    {"text_input": "x" * 10_000_000},
]
BAD_TENSORS: list[list[dict[str, Any]]] = [
    [],
    [{"name": "max_tokens", "shape": [1, 1], "datatype": "INT32", "data": [5]}],
    [{**TEXT, "shape": [1, 2], "data": ["a", "b"]}],
    [{**TEXT, "shape": [2, 1], "data": ["a", "b"]}],
    [{**TEXT, "shape": [1]}],
    [{**TEXT, "datatype": "INT32", "data": [5]}],
    [TEXT, {"name": "temperature", "shape": [1, 1], "datatype": "FP64", "data": [0.5]}],
    [TEXT, {"name": "nothing", "shape": [1, 1], "datatype": "FP32", "data": [0.5]}],
    [TEXT, {"name": "seed", "shape": [1, 1], "datatype": "UINT64", "data": [-1]}],
]


def test_bad_requests_are_errors_of_their_own(server: TritonServer, reference: Engine) -> None:
    expected = alone(reference, "beside", 400)
    answers: list[str] = []
    with GrpcStream(server.grpc) as stream:
        beside = threading.Thread(target=lambda: answers.append(stream.ask("beside", max_tokens=400)))
        beside.start()
        for fields in BAD_FIELDS:
            status, body = server.post(f"/v2/models/{MODEL}/generate", {"text_input": "hi"} | fields)
            assert 400 <= status < 600, (fields, body)
            assert body["error"]
            assert "Traceback" not in body["error"]
        for inputs in BAD_TENSORS:
            status, body = server.post(f"/v2/models/{MODEL}/infer", raw(inputs))
            assert 400 <= status < 600, (inputs, body)
            assert body["error"]
        beside.join()
    nan = np.array([[np.nan]], np.float32)
    bad: list[dict[str, Any]] = [{"temperature": nan}, {"top_p": nan}, {"text": np.array([[b"\xff\xfe"]], np.object_)}]
    for fields in bad:
        with GrpcStream(server.grpc) as stream, pytest.raises(RuntimeError, match=r"must be|is not UTF-8"):
            stream.ask(**{"text": "hi"} | fields)
    assert answers == [expected]
    server.wait_idle()
    assert server.generate("hello", max_tokens=5)[1]["text_output"] == alone(reference, "hello", 5)


def test_500_requests_a_third_cancelled(folder: Path, repository: Path, reference: Engine) -> None:
    rng = np.random.default_rng(1)
    texts = [random_text(rng, int(rng.choice([5, 60, 400]))) for _ in range(40)]
    expected = {text: alone(reference, text, 60) for text in texts}

    def burst(count: int) -> list[str]:
        with concurrent.futures.ThreadPoolExecutor(24) as pool:
            return list(pool.map(one, range(count)))

    def one(index: int) -> str:
        mine = np.random.default_rng(index)
        text = texts[index % len(texts)]
        if index % 10 == 9:
            status, _ = server.generate(text, max_tokens=int(mine.choice([0, -3, 5000])))
            return "refused" if status == 400 else f"status {status}"
        with GrpcStream(server.grpc) as stream:
            if index % 3 == 0:
                stream.send(text, max_tokens=2000, end_id=-1)
                for _, outputs in itertools.islice(stream.responses(), int(mine.integers(0, 20))):
                    if "error" in outputs:
                        return f"error {outputs['error']}"
                return "cancelled"
            stream.send(text, max_tokens=60)
            answer = "".join(outputs.get("text_output", "") for _, outputs in stream.responses())
            return "right" if answer == expected[text] else f"wrong {text!r}: {answer!r}"

    with TritonServer(folder, repository) as server:
        burst(100)  # memory settles
        server.wait_idle()
        before = server.memory()
        outcomes = burst(500)
        server.wait_idle()
        grown = {name: value - before[name] for name, value in server.memory().items()}
        # Some streams were cancelled before their request had left, and are not counted there.
        cancelled = server.metric("requests_cancelled")
        server.stop()  # after so many it ends by its own timeout now and then
        server.wait_gone()
    counts = {outcome: outcomes.count(outcome) for outcome in set(outcomes)}
    print(counts, cancelled, grown)
    assert set(counts) == {"right", "cancelled", "refused"}
    assert cancelled > 120
    assert sum(grown.values()) < 20e6


def test_the_examples_of_clients(server: TritonServer, reference: Engine) -> None:
    def run(script: str, *arguments: str) -> tuple[int, str]:
        python = [] if script.endswith(".sh") else [sys.executable]
        command = [*python, str(ROOT / script), *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return done.returncode, done.stdout.decode()

    addresses = [f"http://127.0.0.1:{server.http}", MODEL, f"http://127.0.0.1:{server.metrics}"]
    assert run("docker/triton/check.sh", *addresses) == (0, f"{MODEL} answers\n")
    client = ["examples/triton_client.py", "--address", f"127.0.0.1:{server.grpc}", "--model", MODEL, "--max-tokens"]
    with reference.session() as session:
        encode, decode = reference.tokenizer.encode, reference.tokenizer.decode
        first = list(session.generate(encode("tell me"), 10))
        second = list(session.generate([*first[-1:], *encode("go on")], 10))
    assert run(*client, "10", "tell me", "go on") == (0, f"{decode(first)}\n{decode(second)}\n")
    status, text = run(*client, "-5", "x")
    assert status == 1
    assert "max_tokens must be" in text


def test_images(folder: Path, tmp_path: Path) -> None:
    package, image = folder / "seeing" / "package", ROOT / "docs" / "kept.png"
    with Engine.open(package, threads=1) as engine, engine.session() as session:
        prompt = encode_prompt(engine, "what is it?", chat=True, images=[image])
        expected = engine.tokenizer.decode(list(session.generate(prompt, 8)))
        total = len(prompt.tokens)
    write_model(tmp_path / "repository", package, folder / "model", max_sequences=2)
    encoded = base64.b64encode(image.read_bytes()).decode()
    fields: dict[str, Any] = {"max_tokens": 8, "chat": True}
    with TritonServer(folder, tmp_path / "repository") as server:
        for text in (encoded, "data:image/png;base64," + encoded):
            _, body = server.generate("what is it?", image=[text], return_num_input_tokens=True, **fields)
            assert (body["text_output"], body["num_input_tokens"]) == (expected, total)
        with GrpcStream(server.grpc) as stream:
            assert stream.ask("what is it?", image=image.read_bytes(), **fields) == expected
        for bad in ("%%%", encoded[:400], base64.b64encode(b"no image").decode()):
            status, body = server.generate("what is it?", image=[bad], **fields)
            assert status == 400
            assert body["error"]
        assert server.generate("what is it?", **fields)[0] == 200


def test_stopping_lets_streams_end_and_it_starts_again(folder: Path, repository: Path, reference: Engine) -> None:
    for _ in range(2):
        with TritonServer(folder, repository) as server:
            assert server.generate("hello", max_tokens=5)[1]["text_output"] == alone(reference, "hello", 5)
            events = server.events("running", max_tokens=500, end_id=-1)
            next(events)
            server.process.terminate()
            assert [event["finish_reason"] for event in events if "finish_reason" in event] == ["length"]
            assert server.process.wait(PATIENCE) == 0
            server.wait_gone()


def test_a_server_that_is_killed_leaves_nothing(folder: Path, repository: Path) -> None:
    # An open gRPC stream keeps tritonserver 24.10 from ending after SIGTERM, so that it must be killed.
    with TritonServer(folder, repository) as server, GrpcStream(server.grpc) as stream:
        stream.send("running", max_tokens=2000, end_id=-1)
        next(stream.responses())
        assert server.stubs()
        server.process.kill()
        server.process.wait()
        server.wait_gone()


def test_unload_during_a_stream(folder: Path, repository: Path, reference: Engine) -> None:
    arguments = ("--model-control-mode=explicit", f"--load-model={MODEL}")
    with TritonServer(folder, repository, *arguments) as server:
        with GrpcStream(server.grpc) as stream:
            stream.send("running", max_tokens=300, end_id=-1)
            responses = stream.responses()
            pieces = [next(responses)[1]]
            assert server.post(f"/v2/repository/models/{MODEL}/unload", {})[0] == 200
            pieces += [outputs for _, outputs in responses]
        # Triton lets what runs end before it unloads.
        with reference.session() as session:
            tokens = list(session.generate(reference.tokenizer.encode("running"), 300, stop_ids=frozenset()))
        assert "".join(outputs.get("text_output", "") for outputs in pieces) == reference.tokenizer.decode(tokens)
        wait_until(lambda: not server.stubs(), "the model's process is still there")
        assert server.generate("hello")[0] == 404
        assert server.post(f"/v2/repository/models/{MODEL}/load", {})[0] == 200
        assert server.generate("hello", max_tokens=5)[1]["text_output"] == alone(reference, "hello", 5)
