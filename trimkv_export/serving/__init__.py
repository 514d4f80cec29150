"""Serve a package to many at once: continuous batching over the runtime, and a model repository for Triton."""

from trimkv_export.serving.options import ServingOptions
from trimkv_export.serving.replies import Client, Reply, RequestError
from trimkv_export.serving.requests import GenerateRequest
from trimkv_export.serving.scheduler import Scheduler

__all__ = ["Client", "GenerateRequest", "Reply", "RequestError", "Scheduler", "ServingOptions"]
