"""Run a package: engine, sessions, tokenizer, sampling. Needs numpy, onnxruntime and tokenizers, never torch."""

from trimkv_export.runtime.engine import Engine
from trimkv_export.runtime.pictures import ImageSource, Video, VisualPrompt
from trimkv_export.runtime.sampling import Sampler, SamplingOptions
from trimkv_export.runtime.session import Session
from trimkv_export.runtime.tokenizer import Tokenizer

__all__ = ["Engine", "ImageSource", "Sampler", "SamplingOptions", "Session", "Tokenizer", "Video", "VisualPrompt"]
