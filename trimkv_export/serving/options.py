"""The settings of a served model: fields here, options of `trimkv-export triton`, `parameters` of config.pbtxt."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from trimkv_export.backends.threads import MAX_THREADS
from trimkv_export.checks import require_whole
from trimkv_export.compat import Self
from trimkv_export.config import MAX_COUNT
from trimkv_export.errors import OptionError
from trimkv_export.runtime import Engine
from trimkv_export.text.sampling import SamplingOptions
from trimkv_export.vision.image_files import MAX_IMAGE_PIXELS, MOST_IMAGE_PIXELS
from trimkv_export.words import shorten

__all__ = ["ServingOptions"]

MOST, MOST_THREADS = 2**31 - 1, 256
FLAGS = {"true": True, "false": False}


def _option(default: Any, about: str, low: int = 0, high: int = MOST) -> Any:
    """A field; `low` and `high` are the least and the largest value of a whole number."""
    return field(default=default, metadata={"help": about, "low": low, "high": high})


@dataclass(frozen=True)
class ServingOptions:
    """How a package is served. What a field means is in its metadata, under "help".

    Raises:
        OptionError: a value is out of range.
    """

    provider: str = _option("cpu", "The model runs here: cpu, cuda or tensorrt.")
    threads: int = _option(
        0, "One step uses this many threads; 0 takes as many as the process may keep busy.", 0, MAX_THREADS
    )
    budget: int = _option(0, "Each stream keeps this many entries on average; 0 keeps what the package was built for.")
    max_sequences: int = _option(16, "This many requests run at a time; each has a row of the cache.", 1)
    queue_limit: int = _option(128, "This many requests may wait for a row; more are refused.")
    prefill_chunk: int = _option(
        0, "A prompt is read in chunks of this many tokens, with a decode step after each; 0 takes the package's."
    )
    max_context: int = _option(
        0, "A prompt, its answer and the turns before them may have this many positions; 0 takes the model's context."
    )
    max_prompt_bytes: int = _option(4 << 20, "The texts of a request may have this many bytes.", 1)
    max_images: int = _option(16, "A request may have this many images.")
    max_image_bytes: int = _option(32 << 20, "Each image file of a request may have this many bytes.")
    max_image_pixels: int = _option(
        MAX_IMAGE_PIXELS, "Each image of a request may have this many pixels.", 1, MOST_IMAGE_PIXELS
    )
    max_total_pixels: int = _option(1 << 27, "All images of a request together may have this many pixels.", 1)
    max_videos: int = _option(1, "A request may have this many videos; 0 takes none.")
    max_video_bytes: int = _option(64 << 20, "Each video file of a request may have this many bytes.")
    max_video_pixels: int = _option(
        1 << 33, "All frames of a request's videos together may have this many pixels.", 1, 1 << 48
    )
    max_frames: int = _option(
        0,
        "A video may have this many frames taken, evenly; 0 takes what the package was planned for.",
        0,
        MAX_COUNT,
    )
    max_waiting_bytes: int = _option(
        1 << 30, "Requests that wait may hold this many bytes, their prepared pictures included; more are refused.", 1
    )
    reader_threads: int = _option(
        1, "Long texts and large images are read by this many threads; small requests have their own.", 1, MOST_THREADS
    )
    max_tokens: int = _option(32768, "A request may ask for this many tokens.", 1)
    default_max_tokens: int = _option(256, "A request that does not say how many tokens it wants gets this many.", 1)
    temperature: float = _option(
        0.0, "A request that names no temperature has this one: 0 takes the likeliest token, more draws more freely."
    )
    top_p: float = _option(
        1.0, "A request that names no top_p draws from the likeliest tokens that together have this probability."
    )
    top_k: int = _option(0, "A request that names no top_k draws from this many likeliest tokens; 0 draws from all.")
    repetition_penalty: float = _option(
        1.0, "A request that names no penalty has this one: a value above 1 makes tokens that were used less likely."
    )
    timeout: float = _option(600.0, "A request may take this many seconds, its wait included; 0 sets no limit.")
    max_conversations: int = _option(
        64, "This many conversations are kept between turns, each as large as a row of the cache; 0 keeps none."
    )
    conversation_expiry: float = _option(600.0, "A conversation that is not used for this many seconds is forgotten.")
    trust_package_plugin: bool = _option(
        False, "With tensorrt, the package's own native library is loaded where none is installed."
    )
    exit_on_failure: bool = _option(
        False, "The server is ended when the model's process or its engine has failed, so that it can be started again."
    )

    def __post_init__(self) -> None:
        if self.provider not in ("cpu", "cuda", "tensorrt"):
            raise OptionError(f"provider must be cpu, cuda or tensorrt, got {shorten(self.provider)}")
        for option in fields(self):
            if option.type is int:
                require_whole(option.name, getattr(self, option.name), option.metadata["low"], option.metadata["high"])
            if option.type is bool and not isinstance(value := getattr(self, option.name), bool):
                raise OptionError(f"{option.name} must be true or false, got {shorten(value)}")
        for name in ("timeout", "conversation_expiry"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise OptionError(f"{name} must be a number of seconds, 0 or more, got {value!r}")
        SamplingOptions(self.temperature, self.top_p, self.top_k, repetition_penalty=self.repetition_penalty)
        if self.default_max_tokens > self.max_tokens:
            raise OptionError(
                f"default_max_tokens must not be above max_tokens, {self.max_tokens}; got {self.default_max_tokens}"
            )

    @classmethod
    def from_parameters(cls, texts: Mapping[str, str]) -> Self:
        """The options of `parameters`, all of them text.

        Raises:
            OptionError: a parameter is not known, or its value cannot be used.
        """
        kinds: dict[str, Any] = {option.name: option.type for option in fields(cls)}
        values: dict[str, Any] = {}
        for name, text in texts.items():
            if name not in kinds:
                raise OptionError(f"unknown parameter {shorten(name)}; known are {', '.join(kinds)}")
            try:
                values[name] = FLAGS[text.lower()] if kinds[name] is bool else kinds[name](text)
            except (KeyError, ValueError):
                kind = {int: "a whole number", bool: "true or false"}.get(kinds[name], "a number")
                raise OptionError(f"parameter {name} must be {kind}, got {shorten(text)}") from None
        return cls(**values)

    def open_engine(self, package: Path) -> Engine:
        """Open a package as these options say. Raises as `Engine.open`."""
        return Engine.open(
            package,
            self.provider,
            max_sessions=self.max_sequences,
            threads=self.threads or None,
            context=self.max_context or None,
            max_image_pixels=self.max_image_pixels,
            trust_package_plugin=self.trust_package_plugin,
        )

    def parameters(self) -> dict[str, str]:
        """The inverse of `from_parameters`: every field as text."""
        return {option.name: _text(getattr(self, option.name)) for option in fields(self)}


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
