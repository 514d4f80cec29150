"""Runs the model of a repository once, with stand-ins for Triton's module.

    triton_stand_in.py VERSION_FOLDER PARAMETERS

Prints what it answered, and which modules were loaded, from where.
"""

import importlib
import json
import sys
import threading
import types
from typing import Any

import numpy as np

ended = threading.Event()
pieces: list[Any] = []


class Tensor:
    def __init__(self, name: str, array: Any) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._array


class Sender:
    def send(self, response: Any, flags: int) -> None:
        pieces.append((response.error, {t.name(): t.as_numpy().item().decode() for t in response.outputs}))
        if flags:
            ended.set()

    def is_cancelled(self) -> bool:
        return False


class Request:
    def __init__(self, **inputs: Any) -> None:
        self._inputs = inputs

    def inputs(self) -> list[Tensor]:
        return [Tensor(name, value) for name, value in self._inputs.items()]

    def get_response_sender(self) -> Sender:
        return Sender()

    def parameters(self) -> str:
        return ""

    def timeout(self) -> int:
        return 0


class Response:
    def __init__(self, outputs: Any = (), error: Any = None) -> None:
        self.outputs, self.error = outputs, error


class Error:
    INVALID_ARG, NOT_FOUND, UNAVAILABLE, CANCELLED, INTERNAL = range(5)

    def __init__(self, message: str, code: int) -> None:
        self.message, self.code = message, code


class Family:
    GAUGE, COUNTER = range(2)

    def __init__(self, **_: Any) -> None:
        pass

    def Metric(self, labels: Any) -> Any:  # noqa: N802 (Triton's name)
        return types.SimpleNamespace(set=lambda value: None, increment=lambda value: None)


def main(folder: str, parameters: dict[str, str]) -> None:
    utils: Any = types.ModuleType("triton_python_backend_utils")
    utils.Tensor, utils.InferenceResponse, utils.TritonError, utils.MetricFamily = Tensor, Response, Error, Family
    utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    sys.modules["triton_python_backend_utils"] = utils
    sys.path.insert(0, folder)
    served = importlib.import_module("model").TritonPythonModel()
    config = json.dumps({"parameters": {name: {"string_value": value} for name, value in parameters.items()}})
    served.initialize({"model_config": config, "model_name": "m", "model_version": "1"})
    for max_tokens in (9, -9):
        text, count = np.array([[b"hello"]], np.object_), np.array([[max_tokens]], np.int32)
        served.execute([Request(text_input=text, max_tokens=count)])
        assert ended.wait(60)
        ended.clear()
    served.finalize()
    (_, answer), (error, _) = pieces
    print(
        json.dumps(
            {
                "answer": answer,
                "error": error.message,
                "code": error.code,
                "loaded": sorted({"torch", "onnx", "transformers", "ml_dtypes", "yaml", "click"} & set(sys.modules)),
                "where": sys.modules["trimkv_export"].__file__,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
