"""The model that Triton's Python backend runs: tensors to requests, replies to responses. It is copied as model.py."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # in a model repository the runtime lies next to this file

import numpy as np  # noqa: E402
import triton_python_backend_utils as pb_utils  # noqa: E402

from trimkv_export.serving import GenerateRequest, Reply, RequestError, Scheduler, ServingOptions  # noqa: E402
from trimkv_export.serving.requests import parse_request, read_tensors  # noqa: E402

METRICS_SECONDS = 0.5
# $1: the server, $2: this process, $3: its shared memory.
WATCH = (
    'while kill -0 "$1" && kill -0 "$2"; do sleep 1; done 2>/dev/null; kill -0 "$1" || { kill -9 "$2"; rm -f "$3"; }'
)
# Of Counts: what is of now, and what only grows.
GAUGES = {
    "live": ("live_sequences", "Requests on a row of the cache"),
    "queued": ("queue_depth", "Requests that wait for a row"),
    "conversations": ("conversations", "Conversations kept between turns"),
    "cache_bytes": ("cache_bytes", "Bytes of the cache, all rows"),
}
COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Tokens of prompts fed"),
    "generated_tokens": ("generated_tokens", "Tokens chosen"),
    "evictions": ("evictions", "Evictions from the cache of requests that have ended"),
    "finished": ("requests_finished", "Requests answered to the end"),
    "cancelled": ("requests_cancelled", "Requests cancelled by their client"),
    "failed": ("requests_failed", "Requests that ended with an error"),
}


class TritonPythonModel:
    """One package, served. Decoupled: `execute` queues requests, and the engine thread answers them."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the package and warm it up; the model is ready afterwards."""
        self._watch = _watch()
        parameters = json.loads(args["model_config"])["parameters"]
        texts = {name: value["string_value"] for name, value in parameters.items() if name != "EXECUTION_ENV_PATH"}
        self._options = options = ServingOptions.from_parameters(texts)
        self._scheduler = Scheduler(lambda: options.open_engine(HERE / "package"), options)
        self._metrics = _Metrics(self._scheduler, {"model": args["model_name"], "version": args["model_version"]})
        self._stopping = threading.Event()
        self._reporter = threading.Thread(target=self._report, name="trimkv-metrics", daemon=True)
        self._reporter.start()

    def execute(self, requests: list[Any]) -> None:
        """Queue requests; one that cannot be served is answered here."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                values = read_tensors({tensor.name(): tensor.as_numpy() for tensor in request.inputs()})
                parsed = parse_request(values, self._options, json.loads(request.parameters() or "{}"))
                self._scheduler.submit(parsed, _Client(sender, parsed), request.timeout() / 1e6)
            except RequestError as error:
                _send_error(sender, error)
            except Exception as error:
                _send_error(sender, RequestError("internal", f"internal error: {error!r}"))

    def finalize(self) -> None:
        """Stop; whoever still waits gets an error."""
        self._stopping.set()
        self._reporter.join()
        self._scheduler.close()
        self._watch.terminate()
        self._watch.wait()

    def _report(self) -> None:
        while not self._stopping.wait(METRICS_SECONDS):
            self._metrics.publish()


class _Client:
    """A request's end in Triton."""

    def __init__(self, sender: Any, request: GenerateRequest) -> None:
        self._sender, self._request = sender, request

    def send(self, reply: Reply) -> None:
        if reply.error is not None:
            _send_error(self._sender, reply.error)
            return
        outputs = [_text("text_output", reply.text)]
        if reply.finish_reason is not None:
            outputs.append(_text("finish_reason", reply.finish_reason))
        if self._request.return_num_input_tokens:
            outputs.append(_count("num_input_tokens", reply.prompt_tokens))
        if self._request.return_num_output_tokens:
            outputs.append(_count("num_output_tokens", reply.tokens))
        self._sender.send(pb_utils.InferenceResponse(outputs), _flags(reply.final))

    def is_cancelled(self) -> bool:
        cancelled: bool = self._sender.is_cancelled()
        return cancelled


def _text(name: str, text: str) -> Any:
    return pb_utils.Tensor(name, np.array([[text.encode()]], np.object_))


def _count(name: str, value: int) -> Any:
    return pb_utils.Tensor(name, np.array([[value]], np.uint32))


def _flags(final: bool) -> int:
    return int(pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL) if final else 0


def _send_error(sender: Any, error: RequestError) -> None:
    kinds = pb_utils.TritonError
    code = {
        "invalid": kinds.INVALID_ARG,
        "not_found": kinds.NOT_FOUND,
        "unavailable": kinds.UNAVAILABLE,
        "timeout": kinds.UNAVAILABLE,
        "cancelled": kinds.CANCELLED,
        "internal": kinds.INTERNAL,
    }[error.kind]
    sender.send(pb_utils.InferenceResponse(error=kinds(str(error), code)), _flags(True))


class _Metrics:
    """The scheduler's counts as metrics of the server; their names begin with trimkv_."""

    def __init__(self, scheduler: Scheduler, labels: dict[str, str]) -> None:
        def metric(name: str, about: str, kind: Any) -> Any:
            family = pb_utils.MetricFamily(name=f"trimkv_{name}", description=about, kind=kind)
            self._families.append(family)  # a metric does not outlive its family
            return family.Metric(labels=labels)

        self._families: list[Any] = []
        self._scheduler, self._before = scheduler, dict.fromkeys(COUNTERS, 0)
        gauge, counter = pb_utils.MetricFamily.GAUGE, pb_utils.MetricFamily.COUNTER
        self._gauges = {field: metric(*names, gauge) for field, names in GAUGES.items()}
        self._counters = {field: metric(*names, counter) for field, names in COUNTERS.items()}
        self._rate = metric("tokens_per_second", "Tokens chosen a second, lately", gauge)

    def publish(self) -> None:
        """Bring the metrics up to date. Called every METRICS_SECONDS."""
        counts = self._scheduler.counts()
        for field, metric in self._gauges.items():
            metric.set(getattr(counts, field))
        for field, metric in self._counters.items():
            grown = getattr(counts, field) - self._before[field]
            self._before[field] += grown
            metric.increment(grown)
            if field == "generated_tokens":
                self._rate.set(grown / METRICS_SECONDS)


def _watch() -> subprocess.Popen[bytes]:
    """Start the shell that ends this process and removes its shared memory once the server is gone.

    A server that is killed, or does not end in time after SIGTERM, leaves both behind, and this process may then wait
    for it forever, in a call that keeps Python from running anything else.
    """
    arguments = Path("/proc/self/cmdline").read_bytes().split(b"\0")  # program, model, shared-memory region, …
    region = Path("/dev/shm") / Path(arguments[2].decode()).name  # noqa: S108
    ids = str(os.getppid()), str(os.getpid())
    return subprocess.Popen(["/bin/sh", "-c", WATCH, "watch", *ids, str(region)])  # noqa: S603
