"""Stands in for ONNX Runtime with CUDA graphs: captures and replays as it does, around a CPU session."""

from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest

from trimkv_export.runtime import engine as engine_module
from trimkv_export.runtime.cache_memory import DeviceMemory

__all__ = ["CapturingSession", "capturing"]


class CapturingSession:
    """A CPU session with ONNX Runtime's CUDA graphs as a caller meets them.

    The first run with an id executes the model `first_runs` times; later ones run what was bound at the first.
    """

    first_runs = 3  # two for its allocations, and the launch of what it captured
    refusal: str | None = None
    fails = False
    loses_provider = False

    def __init__(self, path: str, options: Any, providers: list[Any]) -> None:
        if self.refusal:
            raise RuntimeError(self.refusal)
        self.providers = providers
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.captured: dict[str, Any] = {}
        self.ids: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"] if self.loses_provider else ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def run_with_iobinding(self, binding: Any, options: Any = None) -> None:
        if self.providers[0][1].get("enable_cuda_graph") != "1":
            self.session.run_with_iobinding(binding)
            return
        graph = options.get_run_config_entry("gpu_graph_id")
        self.ids.append(graph)
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        runs = 1
        if graph != "-1":
            runs = 1 if graph in self.captured else self.first_runs
            binding = self.captured.setdefault(graph, binding)
        for _ in range(runs):
            self.session.run_with_iobinding(binding)


def capturing(monkeypatch: pytest.MonkeyPatch) -> type[CapturingSession]:
    """Makes `Engine.open(…, "cuda", cuda_graph=True)` open a CapturingSession; its class, for a test to change."""

    class Fresh(CapturingSession):
        pass

    runtime = SimpleNamespace(
        InferenceSession=Fresh,
        SessionOptions=onnxruntime.SessionOptions,
        RunOptions=onnxruntime.RunOptions,
        OrtValue=onnxruntime.OrtValue,
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )
    monkeypatch.setattr(engine_module, "import_onnxruntime", lambda: runtime)
    monkeypatch.setattr(engine_module, "built_with_cuda", lambda _: True)
    monkeypatch.setattr(engine_module, "DeviceMemory", lambda slab, _, made_by: DeviceMemory(slab, "cpu", made_by))
    return Fresh
