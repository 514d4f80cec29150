"""The options of a build, as frozen dataclasses. Every value is checked here, once, wherever it comes from."""

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from trimkv_export.compat import StrEnum
from trimkv_export.dtypes import ITEM_BYTES
from trimkv_export.errors import OptionError

__all__ = [
    "FLOATS",
    "BuildOptions",
    "EngineWeights",
    "EvictionConfig",
    "PlanOptions",
    "Policy",
    "Precision",
    "Quantization",
    "Recipe",
    "Target",
    "WeightStorage",
]


class Precision(StrEnum):
    """Element type of weights, activations and cached keys and values; INT4 and INT8 are of weights only."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT4 = "int4"
    INT8 = "int8"

    @property
    def weight_only(self) -> bool:
        """Whether activations, keys and values need a type of their own."""
        return self in (Precision.INT4, Precision.INT8)

    @property
    def dtype(self) -> str:
        """NumPy's name of a float type (`ml_dtypes` provides bfloat16)."""
        return {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[self]

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return ITEM_BYTES[self.dtype]


class Policy(StrEnum):
    """Which entries compete with each other (docs/design.md, section 3)."""

    GLOBAL = "global"
    PER_HEAD = "per_head"


class WeightStorage(StrEnum):
    """How checkpoint files that need no conversion come into the package."""

    COPY = "copy"
    LINK = "link"


class Target(StrEnum):
    """What a package is built for. Every package can also be run by ONNX Runtime."""

    ONNXRUNTIME = "onnxruntime"
    TENSORRT = "tensorrt"
    TENSORRT_LLM = "tensorrt-llm"
    TENSORRT_RTX = "tensorrt-rtx"

    @property
    def decodes_in_tensorrt(self) -> bool:
        """Whether TensorRT runs the decoder, with plugins."""
        return self in (Target.TENSORRT, Target.TENSORRT_LLM)


class EngineWeights(StrEnum):
    """Where a TensorRT engine has its weights: inside; nowhere, taken from the package's weight files when it is
    opened; or inside, and on the GPU only as far as they fit.
    """

    INCLUDED = "included"
    STRIPPED = "stripped"
    STREAMED = "streamed"


FLOATS = (Precision.FP32, Precision.FP16, Precision.BF16)
BLOCK_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Quantization:
    """How the decoder's linear layers are stored: whole numbers, and a scale for each block of a row.

    bits: 4 or 8. block_size: columns with one scale (and zero point). per_row: the blocks of a row have the same scale.
    symmetric: without zero points. head: the last projection and the embedding too.
    qdq: for TensorRT, as signed numbers that standard DequantizeLinear nodes read, the embedding in float; else for the
    operators of ONNX Runtime. scale_dtype: of the scales; None takes that of the package's floats.
    """

    bits: int
    block_size: int
    per_row: bool = False
    symmetric: bool = True
    head: bool = True
    qdq: bool = False
    scale_dtype: str | None = None


def _require(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise OptionError(f"{name} must be a whole number from {low} to {high}, got {value!r}")


@dataclass(frozen=True)
class EvictionConfig:
    """The eviction policy of one package.

    budget: M, kept entries per stream on average.
    evict_every: b, eviction runs once b tokens have come in since the cache was full (the official `buffer_size`).
    min_tokens_per_head: m, with the global policy each stream keeps m entries more than it won (if it has them).
    lookahead_steps: k, score an entry by its expected use over the next k tokens.

    Raises OptionError when a value, or the combination, cannot be used.
    """

    policy: Policy
    budget: int
    evict_every: int = 32
    min_tokens_per_head: int = 0
    lookahead_steps: int = 1

    def __post_init__(self) -> None:
        if self.policy == "threshold":
            raise OptionError(
                "policy 'threshold' keeps every entry above a score, so its memory has no bound; "
                "use 'global' or 'per_head'"
            )
        if self.policy not in tuple(Policy):
            raise OptionError(f"policy must be one of {', '.join(Policy)}, got {self.policy!r}")
        object.__setattr__(self, "policy", Policy(self.policy))
        _require("budget", self.budget, 1, 1 << 20)
        _require("evict-every", self.evict_every, 1, 1 << 16)
        _require("lookahead-steps", self.lookahead_steps, 1, 1 << 16)
        _require("min-tokens-per-head", self.min_tokens_per_head, 0, 1 << 20)
        if self.min_tokens_per_head > self.budget:
            raise OptionError(
                f"min-tokens-per-head must not exceed the budget: got {self.min_tokens_per_head} "
                f"with a budget of {self.budget}"
            )
        if self.min_tokens_per_head and self.policy is Policy.PER_HEAD:
            raise OptionError(
                f"min-tokens-per-head applies to the global policy only (per_head keeps {self.budget} entries in "
                f"every head anyway), got {self.min_tokens_per_head}"
            )


@dataclass(frozen=True, kw_only=True)
class _NumberOptions:
    """Element types and what they depend on, for the options below.

    precision: of everything, or with int4 and int8 of the weights of linear layers alone. activations: then, that of
    everything else; None takes fp16 for TensorRT and the device of a plan, fp32 for CPUs. block_size: of int4 and int8,
    columns that share a scale. symmetric: without zero points. quantize_head: the last projection and the embedding too
    (TensorRT: not the embedding); None leaves them to checkpoints that are quantised already, and quantises those of
    others. target: what the package is for.
    """

    precision: Precision = Precision.FP32
    activations: Precision | None = None
    block_size: int = 32
    symmetric: bool = True
    quantize_head: bool | None = None
    device: str | None = None
    target: Target = Target.ONNXRUNTIME

    def check_numbers(self) -> None:
        """Raise OptionError when a value, or the combination, cannot be used; take names for members."""
        for name, known in (("precision", tuple(Precision)), ("activations", FLOATS)):
            value = getattr(self, name)
            if value is None and name == "activations":
                continue
            if value not in known:
                raise OptionError(f"{name} must be one of {', '.join(known)}, got {value!r}")
            object.__setattr__(self, name, Precision(value))
        if self.target not in tuple(Target):
            raise OptionError(f"target must be one of {', '.join(Target)}, got {self.target!r}")
        object.__setattr__(self, "target", Target(self.target))
        if self.activations is not None and not self.precision.weight_only:
            raise OptionError(
                f"activations {self.activations} go with precision int4 or int8; {self.precision} is that of everything"
            )
        if self.block_size not in BLOCK_SIZES:
            sizes = ", ".join(map(str, BLOCK_SIZES))
            raise OptionError(f"block-size must be one of {sizes}, got {self.block_size!r}")
        for name in ("symmetric", "quantize_head"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (value is None and name == "quantize_head"):
                raise OptionError(f"{name} must be true or false, got {value!r}")

    @property
    def compute(self) -> Precision:
        """The element type of activations, keys and values, and of the weights that are not quantised."""
        if not self.precision.weight_only:
            return self.precision
        on_cpu = self.device is None or self.device.strip().lower() in ("cpu", "host")
        on_cpu = on_cpu and not self.target.decodes_in_tensorrt
        return self.activations or (Precision.FP32 if on_cpu else Precision.FP16)

    @property
    def quantization(self) -> Quantization | None:
        """How linear layers of a float checkpoint are quantised; None if they are not. int8 has one scale a row."""
        if not self.precision.weight_only:
            return None
        bits = 4 if self.precision is Precision.INT4 else 8
        # In float32, of int4 in blocks of 32, they would be a fifth of what each token has to read.
        halves = "float16" if self.compute is Precision.FP32 and not self.target.decodes_in_tensorrt else None
        head = self.quantize_head is not False
        return Quantization(bits, self.block_size, bits == 8, self.symmetric, head, scale_dtype=halves)


@dataclass(frozen=True)
class PlanOptions(_NumberOptions):
    """What `trimkv-export plan` was asked for.

    device: a name of plan/devices.yaml; None compares with nothing. context: tokens of the full cache to compare
    with; None takes the most that the model was made for.
    """

    model: str
    budget: int
    gates: str | None = None
    revision: str | None = None
    max_batch: int = 1
    prefill_chunk: int = 256
    context: int | None = None
    evict_every: int = 32
    policy: Policy | None = None
    max_image_tokens: int = 1024

    def __post_init__(self) -> None:
        _require("prefill-chunk", self.prefill_chunk, 1, 1 << 16)
        _require("max-image-tokens", self.max_image_tokens, 1, 1 << 16)
        _require("max-batch", self.max_batch, 1, 1 << 16)
        if self.context is not None:
            _require("context", self.context, 1, 1 << 40)
        self.check_numbers()
        self.eviction(self.policy or Policy.GLOBAL)

    def eviction(self, policy: Policy) -> EvictionConfig:
        """The eviction policy of the plan; `policy` is used where the options leave it open."""
        return EvictionConfig(self.policy or policy, self.budget, self.evict_every)


@dataclass(frozen=True)
class BuildOptions(_NumberOptions):
    """What `trimkv-export build` was asked for. `policy` None takes the one that the gates were trained for.

    max_image_tokens: of a model with a vision tower, the most tokens that one image, or a pair of video frames, may
    take; larger pictures are scaled down. It bounds the memory of the tower.
    context: the longest context, in tokens, that the package is to serve; None takes the most that the model was made
    for. Models whose rotary embedding has a variant for short contexts get the one for this.
    device: a name of plan/devices.yaml that the package must fit; None takes any.
    max_batch: sequences at a time of the device's plan, and the most that a TensorRT engine takes.
    engine_weights, timing_cache: of TensorRT engines; the cache is a file of what the builder measured, read and
    written.
    calibrate: of int4 and int8, a file of text on which the model is run to see how weights are best rounded.
    """

    model: str
    output: Path
    budget: int
    gates: str | None = None
    revision: str | None = None
    evict_every: int = 32
    prefill_chunk: int = 256
    policy: Policy | None = None
    min_tokens_per_head: int = 0
    lookahead_steps: int = 1
    max_image_tokens: int = 1024
    weights: WeightStorage = WeightStorage.COPY
    overwrite: bool = False
    max_batch: int = 1
    context: int | None = None
    engine_weights: EngineWeights = EngineWeights.INCLUDED
    timing_cache: Path | None = None
    calibrate: Path | None = None

    def __post_init__(self) -> None:
        _require("prefill-chunk", self.prefill_chunk, 1, 1 << 16)
        _require("max-image-tokens", self.max_image_tokens, 1, 1 << 16)
        for name, kind in (("weights", WeightStorage), ("engine_weights", EngineWeights)):
            value = getattr(self, name)
            if value not in tuple(kind):
                raise OptionError(f"{name.replace('_', '-')} must be one of {', '.join(kind)}, got {value!r}")
            object.__setattr__(self, name, kind(value))
        self.check_numbers()
        if self.device is None and self.max_batch != 1 and not self.target.decodes_in_tensorrt:
            raise OptionError(
                f"max-batch {self.max_batch!r} is for the plan of a device: name one with --device, or build with "
                "--target tensorrt"
            )
        if self.engine_weights is not EngineWeights.INCLUDED and self.target is Target.ONNXRUNTIME:
            raise OptionError(f"engine-weights {self.engine_weights} is for TensorRT engines, not for {self.target}")
        if self.engine_weights is not EngineWeights.INCLUDED and self.target is Target.TENSORRT_LLM:
            raise OptionError(
                f"engine-weights {self.engine_weights} is not for tensorrt-llm, whose loader takes engines that have "
                "them inside; use --target tensorrt"
            )
        if self.timing_cache is not None and not self.target.decodes_in_tensorrt:
            raise OptionError(
                f"timing-cache {self.timing_cache} is for --target tensorrt; building for {self.target} times nothing"
            )
        if self.calibrate is not None and not self.precision.weight_only:
            raise OptionError(
                f"calibrate {self.calibrate} is for --precision int4 and int8; {self.precision} rounds no weights"
            )
        self.plan_options()
        # Fail before any download or hashing; with the policy still open, per_head's extra rule is checked later.
        self.eviction(self.policy or Policy.GLOBAL)

    def eviction(self, policy: Policy) -> EvictionConfig:
        """The eviction policy of this build; `policy` is used where the options leave it open."""
        return EvictionConfig(
            policy=self.policy or policy,
            budget=self.budget,
            evict_every=self.evict_every,
            min_tokens_per_head=self.min_tokens_per_head,
            lookahead_steps=self.lookahead_steps,
        )

    def plan_options(self) -> PlanOptions:
        """The same values for the memory plan."""
        return PlanOptions(**{option.name: getattr(self, option.name) for option in fields(PlanOptions)})


@dataclass(frozen=True)
class Recipe(_NumberOptions):
    """The options of a build for one model on one device, as a file of `engines/` holds them.

    Fields mean what they mean in BuildOptions; model and gates may be folders, from the working directory.

    Raises OptionError when a value is of the wrong type or out of range.
    """

    model: str
    budget: int
    precision: Precision = field(kw_only=True)
    device: str = field(kw_only=True)
    gates: str | None = None
    evict_every: int = 32
    prefill_chunk: int = 256
    max_batch: int = 1
    max_image_tokens: int = 1024
    context: int | None = None

    def __post_init__(self) -> None:
        for name in ("model", "device", *(["gates"] if self.gates is not None else [])):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise OptionError(f"{name} must be a text, got {value!r}")
        self.check_numbers()
        self.plan_options()

    @classmethod
    def parse(cls, content: Any, where: Path) -> "Recipe":
        """The recipe that `content`, read from the file `where`, describes.

        Raises OptionError naming the file: a key that is not known (with the nearest that is), one that is missing, a
        value that cannot be used.
        """
        if not isinstance(content, Mapping):
            raise OptionError(f"{where}: a recipe is keys and values, such as 'budget: 256', got {_short(content)}")
        known = [option.name for option in fields(cls)]
        for key in content:
            if key not in known:
                near = difflib.get_close_matches(str(key).replace("-", "_"), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(known)}"
                raise OptionError(f"{where}: the key {_short(key)} (value {_short(content[key])}) is not known; {hint}")
        if missing := [f.name for f in fields(cls) if f.default is MISSING and f.name not in content]:
            raise OptionError(f"{where}: lacks {', '.join(map(repr, missing))}")
        try:
            return cls(**content)
        except OptionError as error:
            raise OptionError(f"{where}: {error}") from None

    def plan_options(self) -> PlanOptions:
        """The same values for the memory plan."""
        return PlanOptions(**{option.name: getattr(self, option.name) for option in fields(self)})


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
