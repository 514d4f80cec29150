"""Run a package: engine, sessions, tokenizer, sampling. Needs numpy, onnxruntime and tokenizers, never torch."""

from trimkv_export.runtime.engine import Engine
from trimkv_export.runtime.session import Session
from trimkv_export.text.sampling import Sampler, SamplingOptions
from trimkv_export.text.tokenizer import Tokenizer
from trimkv_export.vision.image_files import ImageSource
from trimkv_export.vision.reader import Video, VisualPrompt

__all__ = ["Engine", "ImageSource", "Sampler", "SamplingOptions", "Session", "Tokenizer", "Video", "VisualPrompt"]
