"""The model that Triton's Python backend runs: tensors to requests, replies to responses. It is copied as model.py."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from itertools import accumulate
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RUNTIME = "trimkv_export"


class _Beside(MetaPathFinder):
    """In a model repository the runtime lies next to this file; no installation of another version goes before it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        """See importlib."""
        ours = name.split(".")[0] == RUNTIME
        return PathFinder.find_spec(name, path or [str(HERE)], target) if ours else None


if (HERE / RUNTIME).is_dir():
    sys.meta_path.insert(0, _Beside())

import numpy as np  # noqa: E402
import triton_python_backend_utils as pb_utils  # noqa: E402

from trimkv_export.serving import GenerateRequest, Reply, RequestError, Scheduler, ServingOptions  # noqa: E402
from trimkv_export.serving.histogram import Histogram  # noqa: E402
from trimkv_export.serving.requests import parse_request, read_tensors  # noqa: E402

LOG = logging.getLogger("trimkv_export.serving")

METRICS_SECONDS = 0.5
# After a failure: how long replies may take to be sent before this process ends.
LAST_WORDS_SECONDS = 1.0
# $1: the server, $2: this process, $3: its shared memory, $4: whether the server is ended once this process is gone. It
# would let no stream end, and lets those of other models run until then; so it is killed soon after it was asked.
# A process that has ended but was not waited for is still there for kill -0: its state is Z.
WATCH = """
exec 3>&2 2>/dev/null
alive() { kill -0 "$1" && ! grep -q '^State:.[ZX]' "/proc/$1/status"; }
while alive "$1" && alive "$2"; do sleep 1; done
if ! alive "$1"; then kill -9 "$2"; rm -f "$3"
elif [ "$4" = true ]; then
  echo "trimkv: the model's process $2 is gone, so the server $1 is ended (exit_on_failure)" >&3
  kill -TERM "$1"; sleep 2; kill -KILL "$1"; rm -f "$3"
fi
"""
# Of Counts: what is of now, and what only grows.
GAUGES = {
    "live": ("live_sequences", "Requests on a row of the cache"),
    "queued": ("queue_depth", "Requests that wait for a row"),
    "conversations": ("conversations", "Conversations kept between turns"),
    "cache_bytes": ("cache_bytes", "Bytes of the cache, all rows"),
    "up": ("up", "1 while requests are taken, 0 once the engine has failed"),
}
COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Tokens of prompts fed"),
    "generated_tokens": ("generated_tokens", "Tokens chosen"),
    "evictions": ("evictions", "Evictions from the cache of requests that have ended"),
    "finished": ("requests_finished", "Requests answered to the end"),
    "cancelled": ("requests_cancelled", "Requests cancelled by their client"),
    "failed": ("requests_failed", "Requests that ended with an error"),
    "too_long": ("requests_too_long", "Requests refused for a prompt of too many tokens"),
}
HISTOGRAMS = {
    "first_token": ("time_to_first_token_seconds", "Seconds from a request's arrival to its first token"),
    "next_token": ("time_per_token_seconds", "Seconds from one token of a request to its next"),
}


class TritonPythonModel:
    """One package, served. Decoupled: `execute` queues requests, and the engine thread answers them."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the package and warm it up; the model is ready afterwards."""
        _log_to_stderr(args["model_name"])
        self._watch = _watch()
        try:
            parameters = json.loads(args["model_config"])["parameters"]
            texts = {name: value["string_value"] for name, value in parameters.items() if name != "EXECUTION_ENV_PATH"}
            self._options = options = ServingOptions.from_parameters(texts)
            self._scheduler = Scheduler(lambda: options.open_engine(HERE / "package"), options)
            self._metrics = _Metrics(self._scheduler, {"model": args["model_name"], "version": args["model_version"]})
        except BaseException as error:
            LOG.error("the model cannot be loaded: %s", error)
            _end(self._watch)
            raise
        if options.exit_on_failure:  # from now on; a model that cannot be loaded is Triton's to report
            _end(self._watch)
            self._watch = _watch(end_server=True)
        self._stopping = threading.Event()
        self._reporter = threading.Thread(target=self._report, name="trimkv-metrics", daemon=True)
        self._reporter.start()
        LOG.info("ready: %s", ", ".join(f"{name} {text}" for name, text in options.parameters().items()))

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
                LOG.exception("a request cannot be taken")
                _send_error(sender, RequestError("internal", f"internal error: {error!r}"))

    def finalize(self) -> None:
        """Stop; whoever still waits gets an error."""
        self._stopping.set()
        self._reporter.join()
        _end(self._watch)  # first: from here on this process may go
        self._scheduler.close()
        LOG.info("unloaded")

    def _report(self) -> None:
        self._metrics.publish()
        while not self._stopping.wait(METRICS_SECONDS):
            self._metrics.publish()
            if self._options.exit_on_failure and self._scheduler.failure is not None:
                self._scheduler.flush(LAST_WORDS_SECONDS)
                LOG.critical("this process ends, and so does the server (exit_on_failure)")
                os.kill(os.getpid(), signal.SIGKILL)


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
        self._histograms = [
            _HistogramMetric(getattr(scheduler, field), names, labels, self._families)
            for field, names in HISTOGRAMS.items()
        ]
        self._rate = metric("tokens_per_second", "Tokens chosen a second, lately", gauge)
        # The server shows the last values of a process that is gone for ever: this one does not grow any more then.
        self._reports = metric("reports", "Times that these metrics were brought up to date", counter)

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
        for histogram in self._histograms:
            histogram.publish()
        self._reports.increment(1)


class _HistogramMetric:
    """A histogram as the counters that Prometheus makes of one: Triton's Python backend has none before 24.12."""

    def __init__(
        self, histogram: Histogram, names: tuple[str, str], labels: dict[str, str], families: list[Any]
    ) -> None:
        def family(suffix: str) -> Any:
            counter = pb_utils.MetricFamily.COUNTER
            found = pb_utils.MetricFamily(name=f"trimkv_{names[0]}_{suffix}", description=names[1], kind=counter)
            families.append(found)
            return found

        self._histogram = histogram
        bounds = [*map(str, histogram.bounds), "+Inf"]
        buckets = family("bucket")
        self._metrics = [buckets.Metric(labels=labels | {"le": bound}) for bound in bounds]
        self._metrics += [family(suffix).Metric(labels=labels) for suffix in ("count", "sum")]
        self._before = [0.0] * len(self._metrics)

    def publish(self) -> None:
        up_to = list(accumulate(self._histogram.counts))
        now = [*up_to, up_to[-1], self._histogram.total]
        for metric, value, before in zip(self._metrics, now, self._before, strict=True):
            if value > before:
                metric.increment(value - before)
        self._before = now


def _log_to_stderr(model: str) -> None:
    """What happens goes to stderr, which is the server's."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s trimkv {model} %(levelname)s %(message)s"))
    package = logging.getLogger("trimkv_export")
    package.handlers = [handler]
    package.setLevel(logging.INFO)
    package.propagate = False


def _watch(*, end_server: bool = False) -> subprocess.Popen[bytes]:
    """Start the shell that ends this process and removes its shared memory once the server is gone.

    A server that is killed, or does not end in time after SIGTERM, leaves both behind, and this process may then wait
    for it forever, in a call that keeps Python from running anything else. The other way round, a server does not see
    that this process is gone, and neither do its clients, but for an error of each new request: with `end_server` it is
    ended then.
    """
    arguments = Path("/proc/self/cmdline").read_bytes().split(b"\0")  # program, model, shared-memory region, …
    region = Path("/dev/shm") / Path(arguments[2].decode()).name  # noqa: S108
    ids = str(os.getppid()), str(os.getpid())
    # A session of its own: whoever ends this process by its group must not end the watch.
    return subprocess.Popen(  # noqa: S603
        ["/bin/sh", "-c", WATCH, "watch", *ids, str(region), str(end_server).lower()], start_new_session=True
    )


def _end(watch: subprocess.Popen[bytes]) -> None:
    watch.terminate()
    watch.wait()
