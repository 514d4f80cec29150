"""A real tritonserver as a child process, and clients of it."""

import contextlib
import http.client
import json
import os
import queue
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tritonclient.grpc as grpcclient
from numpy.typing import NDArray

from trimkv_export.compat import Self

ROOT = Path(__file__).parents[2]
MODEL = "demo"
# How long a test waits for what must come; a busy machine takes many times as long as a quiet one.
PATIENCE = 120.0
DTYPES = {int: np.int32, float: np.float32, bool: np.bool_}


def write_model(repository: Path, package: Path, environment: Path, **options: Any) -> None:
    """`trimkv-export triton`, through the library; options as in ServingOptions."""
    from trimkv_export.serving.options import ServingOptions
    from trimkv_export.serving.triton.repository import write_repository

    write_repository(package, repository, ServingOptions(**options), name=MODEL, environment=environment)


class TritonServer:
    """tritonserver on free ports of this machine, in a process group of its own. folder: what make_env.sh made."""

    def __init__(self, folder: Path, repository: Path, *arguments: str) -> None:
        self.prefix = f"trimkv{os.getpid()}_{time.monotonic_ns()}_"
        self.http, self.grpc, self.metrics = free_ports(3)
        libraries = (folder / "libdir").read_text().strip()
        environment = os.environ | {
            "PATH": f"{folder / 'model' / 'bin'}:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": libraries,
        }
        environment.pop("PYTHONPATH", None)  # the model must do with what its repository holds
        hosts = [f"--{name}-address=127.0.0.1" for name in ("http", "grpc", "metrics")]
        self.log = repository.parent / f"{self.prefix}server.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    folder / "tritonserver" / "bin" / "tritonserver",
                    f"--model-repository={repository}",
                    f"--backend-directory={folder / 'backends'}",
                    *hosts,
                    f"--http-port={self.http}",
                    f"--grpc-port={self.grpc}",
                    f"--metrics-port={self.metrics}",
                    "--exit-timeout-secs=30",
                    f"--backend-config=python,shm-region-prefix-name={self.prefix}",
                    *arguments,
                ],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        self.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for region in self.shared_memory():
            region.unlink()

    def wait_ready(self) -> None:
        ends = time.monotonic() + PATIENCE
        while time.monotonic() < ends:
            if self.process.poll() is not None:
                raise RuntimeError(f"tritonserver ended: {self.log.read_text()[-3000:]}")
            with contextlib.suppress(OSError):
                if self.get("/v2/health/ready")[0] == 200:
                    return
            time.sleep(0.05)
        raise RuntimeError(f"tritonserver is not ready: {self.log.read_text()[-3000:]}")

    def stop(self) -> None:
        """SIGTERM, and wait."""
        self.process.terminate()
        self.process.wait(PATIENCE)

    def stubs(self) -> list[psutil.Process]:
        """The processes of its models."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            if any(self.prefix in part for part in process.info["cmdline"] or ()):
                found.append(process)
        return [process for process in found if process.pid != self.process.pid]

    def shared_memory(self) -> list[Path]:
        return list(Path("/dev/shm").glob(self.prefix + "*"))  # noqa: S108

    def wait_gone(self) -> None:
        """Until nothing of it is left, of its models neither."""
        wait_until(lambda: not self.stubs() and not self.shared_memory(), "something is left of the server")

    def memory(self) -> dict[str, int]:
        """Resident bytes of the server and of its models."""
        server = psutil.Process(self.process.pid)
        return {"server": server.memory_info().rss, "model": sum(p.memory_info().rss for p in self.stubs())}

    def get(self, path: str, port: int | None = None) -> tuple[int, str]:
        with self._connection(port) as connection:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()

    def _connection(self, port: int | None = None) -> contextlib.closing[http.client.HTTPConnection]:
        return contextlib.closing(http.client.HTTPConnection("127.0.0.1", port or self.http, timeout=PATIENCE))

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """POST JSON (or bytes as they are) -> status and the JSON that came back."""
        with self._connection() as connection:
            connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body))
            response = connection.getresponse()
            text = response.read()
            return response.status, json.loads(text) if text else None

    def generate(self, text: str, **fields: Any) -> tuple[int, Any]:
        return self.post(f"/v2/models/{MODEL}/generate", {"text_input": text, **fields})

    def events(self, text: str, **fields: Any) -> Generator[Any, None, None]:
        """Server-sent events of generate_stream; closing the iterator closes the connection."""
        body = json.dumps({"text_input": text, "stream": True, **fields})
        with self._connection() as connection:
            connection.request("POST", f"/v2/models/{MODEL}/generate_stream", body)
            with connection.getresponse() as response:
                for line in response:
                    if line.startswith(b"data: "):
                        yield json.loads(line[6:])

    def metric(self, name: str) -> float:
        """A metric of the model."""
        _, text = self.get("/metrics", self.metrics)
        (line,) = (line for line in text.splitlines() if line.startswith(f"trimkv_{name}{{"))
        return float(line.split()[-1])

    def wait_metric(self, name: str, value: float) -> None:
        """Until a metric of the model has this value."""
        wait_until(lambda: self.metric(name) == value, f"{name} is not {value}")

    def wait_reported(self) -> None:
        """Until metrics are of what is now: they are published twice a second, or later on a busy machine."""
        before = self.metric("reports")
        wait_until(lambda: self.metric("reports") >= before + 2, "metrics are not published")

    def wait_idle(self) -> None:
        """Until no row is in use and nothing waits."""

        def idle() -> bool:
            self.wait_reported()
            return not (self.metric("live_sequences") or self.metric("queue_depth"))

        wait_until(idle, "rows are still in use")


class GrpcStream:
    """One gRPC stream, for one request at a time. A context manager; the end cancels what is under way."""

    def __init__(self, port: int) -> None:
        self._client = grpcclient.InferenceServerClient(f"127.0.0.1:{port}")
        self._found: queue.Queue[tuple[float, Any, Any]] = queue.Queue()
        self._client.start_stream(lambda result, error: self._found.put((time.perf_counter(), result, error)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()
        self._client.close()

    def cancel(self) -> None:
        """End what is under way, and the stream."""
        self._client.stop_stream(cancel_requests=True)

    def send(self, text: str, **fields: Any) -> None:
        values = {"text_input": text, "stream": True} | fields
        self._client.async_stream_infer(MODEL, [tensor(name, value) for name, value in values.items()])

    def responses(self) -> Iterator[tuple[float, dict[str, Any]]]:
        """(arrival, outputs) until the last one; an error is {"error": message}."""
        while True:
            arrival, result, error = self._found.get(timeout=PATIENCE)
            if error is not None:
                yield arrival, {"error": error.message()}
                return
            outputs = {
                output.name: value.decode() if isinstance(value := result.as_numpy(output.name)[0, 0], bytes) else value
                for output in result.get_response().outputs
            }
            yield arrival, outputs
            if "finish_reason" in outputs:
                return

    def ask(self, text: str, **fields: Any) -> str:
        """The whole answer. Raises RuntimeError for an error."""
        self.send(text, **fields)
        pieces = []
        for _, outputs in self.responses():
            if "error" in outputs:
                raise RuntimeError(outputs["error"])
            pieces.append(outputs["text_output"])
        return "".join(pieces)


def tensor(name: str, value: Any) -> Any:
    """An input of shape [1, n]; an array is taken as it is."""
    array: NDArray[Any]
    if isinstance(value, np.ndarray):
        array = value
    else:
        values = value if isinstance(value, list) else [value]
        array = np.array([values], DTYPES.get(type(values[0]), np.object_))
        if name == "seed":
            array = array.astype(np.uint64)
    kind = {np.int32: "INT32", np.float32: "FP32", np.bool_: "BOOL", np.uint64: "UINT64", np.int64: "INT64"}
    found = grpcclient.InferInput(name, list(array.shape), kind.get(array.dtype.type, "BYTES"))
    if array.dtype == np.object_:
        array = np.array([[v.encode() if isinstance(v, str) else v for v in row] for row in array], np.object_)
    found.set_data_from_numpy(array)
    return found


def wait_until(holds: Callable[[], bool], otherwise: str) -> None:
    """Until something holds; RuntimeError with `otherwise` where it does not after PATIENCE."""
    ends = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > ends:
            raise RuntimeError(otherwise)
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
