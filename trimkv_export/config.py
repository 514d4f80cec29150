"""The options of a build: one table, of which dataclasses, command line and recipes are made.

A field's annotation says all there is to say of an option: its type, its limits, its help and where the help lists it.
`PlanOptions` has what a memory plan depends on, `Recipe` adds what else a file may say of a build, `BuildOptions` what
only the person who builds can say. Every value is checked here, once, wherever it comes from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, MISSING, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args

from trimkv_export.checks import require_whole
from trimkv_export.compat import StrEnum
from trimkv_export.dtypes import ITEM_BYTES
from trimkv_export.errors import OptionError
from trimkv_export.words import shorten

__all__ = [
    "BASICS",
    "FLOATS",
    "GROUPS",
    "MAX_BUDGET",
    "MAX_COUNT",
    "MAX_FRAMES",
    "MAX_IMAGE_PIXELS",
    "MEMORY",
    "MOST_IMAGE_PIXELS",
    "BuildOptions",
    "EngineWeights",
    "EvictionConfig",
    "HeadWeights",
    "Method",
    "Option",
    "PlanOptions",
    "Policy",
    "Precision",
    "Quantization",
    "Recipe",
    "Target",
    "WeightStorage",
    "options_of",
]

# What the help lists together, in this order.
BASICS, EVICTION, NUMBERS, MEMORY, TENSORRT = GROUPS = (
    "Basics", "Eviction", "Precision and quantisation", "Memory plan", "TensorRT"
)  # fmt: skip
MAX_COUNT = 1 << 16  # of most numbers: tokens of a step, sequences at a time
MAX_BUDGET = 1 << 20
MAX_IMAGE_PIXELS = 1 << 26  # of an image as it is in its file, unless told otherwise: 8,192 x 8,192
MOST_IMAGE_PIXELS = 178_956_970  # what may be asked for in its place: Pillow refuses more
MAX_FRAMES = 768  # that are taken of a video, unless told otherwise: the limit of the models' own processors


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


class HeadWeights(StrEnum):
    """How the last projection, and the embedding, of a package with int4 or int8 are stored."""

    INT8 = "int8"
    INT4 = "int4"
    FLOAT = "float"


class Method(StrEnum):
    """How calibration rounds: AWQ (arXiv 2306.00978) or GPTQ (arXiv 2210.17323)."""

    AWQ = "awq"
    GPTQ = "gptq"


class EngineWeights(StrEnum):
    """Where a TensorRT engine has its weights: inside; nowhere, taken from the package's weight files when it is
    opened; or inside, and on the GPU only as far as they fit.
    """

    INCLUDED = "included"
    STRIPPED = "stripped"
    STREAMED = "streamed"


FLOATS = (Precision.FP32, Precision.FP16, Precision.BF16)


@dataclass(frozen=True)
class Option:
    """One row of the table, written as the annotation of a field.

    Attributes:
        group: the part of the help that lists it.
        help: what the help says of it; the default is added.
        low, high: limits of a number.
        choices: the values that it takes; of an enumeration, all members unless it says fewer.
        refused: values that are known and not taken, and the reason, as the end of a sentence about the value.
        off: the name of the flag that says no; "" is `no-` and the name.
        name, kind, optional, default: of the field, filled in by `options_of`: optional ones may be None; required ones
            have None for a default.
    """

    group: str
    help: str
    _: KW_ONLY
    low: int = 1
    high: int = MAX_COUNT
    choices: tuple[Any, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    off: str = ""
    name: str = ""
    kind: type = str
    optional: bool = False
    default: Any = None

    @property
    def flag(self) -> str:
        """The name on the command line, without the leading dashes; errors call it so too."""
        return self.name.replace("_", "-")

    def check(self, value: Any) -> Any:
        """Return the value as the field has it: a name becomes its member, a text its path.

        Raises:
            OptionError: the value cannot be used.
        """
        if value is None and self.optional:
            return None
        if isinstance(value, str) and value in self.refused:
            raise OptionError(f"{self.flag} {value!r} {self.refused[value]}")
        if self.choices:
            for choice in self.choices:
                if value == choice and not isinstance(value, bool):
                    return choice
            wanted = f"one of {', '.join(map(str, self.choices))}"
        elif self.kind is int:
            return require_whole(self.flag, value, self.low, self.high)
        elif self.kind is float:
            if isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high:
                return float(value)
            wanted = f"a number from {self.low} to {self.high}"
        elif self.kind is bool:
            if isinstance(value, bool):
                return value
            wanted = "true or false"
        elif isinstance(value, self.kind | str) and str(value).strip():
            return self.kind(value)
        else:
            wanted = "a path" if self.kind is Path else "a text"
        raise OptionError(f"{self.flag} must be {wanted}, got {shorten(value)}")


@cache
def options_of(owner: type) -> tuple[Option, ...]:
    """The rows of a dataclass, in the order of its fields."""
    rows = []
    for each in fields(owner):
        annotation: Any = each.type
        inner = annotation.__origin__
        kind = next(found for found in get_args(inner) or (inner,) if found is not NoneType)
        row: Option = annotation.__metadata__[0]
        choices = row.choices or (tuple(kind) if issubclass(kind, StrEnum) else ())
        optional = NoneType in get_args(inner)
        default = None if each.default is MISSING else each.default
        rows.append(replace(row, name=each.name, kind=kind, optional=optional, default=default, choices=choices))
    return tuple(rows)


def _check_fields(owner: object) -> None:
    for option in options_of(type(owner)):  # type: ignore[arg-type] # mypy takes a class for not hashable
        object.__setattr__(owner, option.name, option.check(getattr(owner, option.name)))


_POLICY = Option(
    EVICTION,
    "Let entries compete with all others (global), or with those of their head. Default: as the gates were trained.",
    refused={"threshold": "keeps every entry above a score, so its memory has no bound; use 'global' or 'per_head'"},
)
_Budget = Annotated[
    int, Option(BASICS, "Keep this many entries (M) per layer and KV head, on average.", high=MAX_BUDGET)
]
_EvictEvery = Annotated[int, Option(EVICTION, "Evict whenever this many tokens (b) have come in.")]
_MinTokensPerHead = Annotated[
    int, Option(EVICTION, "Keep this many entries of each head beyond those that it won.", low=0, high=MAX_BUDGET)
]
_LookaheadSteps = Annotated[int, Option(EVICTION, "Score entries by their use over this many coming tokens.")]


@dataclass(frozen=True)
class EvictionConfig:
    """The eviction policy of one package.

    Attributes:
        policy: which entries compete with each other.
        budget: M, kept entries per stream on average.
        evict_every: b, eviction runs once b tokens have come in since the cache was full (the official `buffer_size`).
        min_tokens_per_head: m, with the global policy each stream keeps m entries more than it won (if it has them).
        lookahead_steps: k, score an entry by its expected use over the next k tokens.

    Raises:
        OptionError: a value, or the combination, cannot be used.
    """

    policy: Annotated[Policy, _POLICY]
    budget: _Budget
    evict_every: _EvictEvery = 32
    min_tokens_per_head: _MinTokensPerHead = 0
    lookahead_steps: _LookaheadSteps = 1

    def __post_init__(self) -> None:
        _check_fields(self)
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


@dataclass(frozen=True)
class Quantization:
    """How the decoder's linear layers are stored: whole numbers, and a scale for each block of a row.

    Attributes:
        bits: 4 or 8.
        block_size: columns with one scale (and zero point).
        per_row: the blocks of a row have the same scale.
        symmetric: without zero points.
        head: the last projection and the embedding too.
        head_bits: of these; None takes `bits`.
        qdq: for TensorRT, as signed numbers that standard DequantizeLinear nodes read, the embedding in float; else for
            the operators of ONNX Runtime.
        scale_dtype: of the scales; None takes that of the package's floats.
        floats: names of matrices that stay in float, of a checkpoint that is quantised in part.
    """

    bits: int
    block_size: int
    per_row: bool = False
    symmetric: bool = True
    head: bool = True
    qdq: bool = False
    scale_dtype: str | None = None
    floats: Sequence[str] = ()
    head_bits: int | None = None

    def of_bits(self, bits: int | None) -> "Quantization":
        """The same with numbers of other bits: int8 among int4 keeps the blocks, but for TensorRT has a scale a row."""
        if bits is None or bits == self.bits:
            return self
        return replace(self, bits=bits, per_row=self.qdq and bits == 8, head_bits=None)


@dataclass(frozen=True)
class PlanOptions:
    """What `trimkv-export plan` takes: all that memory depends on. The annotations say what each field means.

    Raises:
        OptionError: a value, or the combination, cannot be used.
    """

    model: Annotated[str, Option(BASICS, "Take this model: an alias (see --list-models), a hub id or a folder.")]
    budget: _Budget
    _: KW_ONLY
    gates: Annotated[str | None, Option(BASICS, "Take these gates: an alias, a hub id or a folder.")] = None
    revision: Annotated[str | None, Option(BASICS, "Take this branch, tag or commit of the model on the hub.")] = None
    target: Annotated[
        Target,
        Option(
            BASICS,
            "Add TensorRT engines, for the GPU of this machine, to what ONNX Runtime runs: with tensorrt-llm also its "
            "engine folder, with tensorrt-rtx one for the vision tower alone.",
        ),
    ] = Target.ONNXRUNTIME
    prefill_chunk: Annotated[int, Option(BASICS, "Take at most this many tokens (C) in one step.")] = 256
    max_image_tokens: Annotated[int, Option(BASICS, "Scale images down to at most this many tokens.")] = 1024
    context: Annotated[
        int | None,
        Option(BASICS, "Serve contexts of up to this many tokens. Default: the model's limit.", high=1 << 40),
    ] = None
    evict_every: _EvictEvery = EvictionConfig.evict_every
    policy: Annotated[Policy | None, _POLICY] = None
    precision: Annotated[
        Precision,
        Option(NUMBERS, "Store weights, activations and cache in this type; int4 and int8 are of linear layers alone."),
    ] = Precision.FP32
    activations: Annotated[
        Precision | None,
        Option(NUMBERS, "With int4 and int8, store the rest so. Default: fp16 for GPUs, else fp32.", choices=FLOATS),
    ] = None
    block_size: Annotated[
        int,
        Option(NUMBERS, "With int4, scale so many columns together; TensorRT takes no 32.", choices=(32, 64, 128)),
    ] = 32
    symmetric: Annotated[
        bool, Option(NUMBERS, "With int4 and int8, store no zero points, or one for each block.", off="asymmetric")
    ] = True
    head: Annotated[
        HeadWeights | None,
        Option(
            NUMBERS,
            "With int4 and int8, store head and embedding so. Default: int8; int4 with int4 where the head is no "
            "embedding and the model large (hidden_size above 2,048); float where the checkpoint is quantised.",
        ),
    ] = None
    mixed: Annotated[
        float | None,
        Option(
            NUMBERS,
            "With int4 and --calibrate, store those layers' matrices in int8 that int4 harms most, up to this many "
            "bits a weight of all layers, scales included.",
            low=4,
            high=9,
        ),
    ] = None
    device: Annotated[
        str | None,
        Option(MEMORY, "Refuse what does not fit this device (see --list-devices); cpu is this machine."),
    ] = None
    max_image_pixels: Annotated[
        int,
        Option(
            MEMORY,
            "Plan for reading images of this many pixels in their files; a run refuses larger ones.",
            high=MOST_IMAGE_PIXELS,
        ),
    ] = MAX_IMAGE_PIXELS
    max_frames: Annotated[
        int, Option(MEMORY, "Plan for so many frames of a video; a run takes no more, evenly.", low=2)
    ] = MAX_FRAMES
    max_batch: Annotated[
        int, Option(MEMORY, "Plan for this many sequences at a time; a TensorRT engine takes no more.")
    ] = 1

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.activations is not None and not self.precision.weight_only:
            raise OptionError(
                f"activations {self.activations} go with precision int4 or int8; {self.precision} is that of everything"
            )
        if self.head is not None and not self.precision.weight_only:
            raise OptionError(
                f"head {self.head} goes with precision int4 or int8; {self.precision} is that of everything"
            )
        if self.mixed is not None and self.precision is not Precision.INT4:
            raise OptionError(f"mixed {self.mixed:g} goes with --precision int4; {self.precision} has one format")
        # With the policy still open, per_head's extra rule is checked later.
        self.eviction(Policy.GLOBAL)

    def eviction(self, policy: Policy) -> EvictionConfig:
        """The eviction policy; `policy` is used where the options leave it open."""
        return EvictionConfig(self.policy or policy, self.budget, self.evict_every)

    def plan_options(self) -> "PlanOptions":
        """The same values for the memory plan."""
        return PlanOptions(**{option.name: getattr(self, option.name) for option in options_of(PlanOptions)})

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
        head = self.head is not HeadWeights.FLOAT
        return Quantization(bits, self.block_size, bits == 8, self.symmetric, head, scale_dtype=halves)


@dataclass(frozen=True, kw_only=True)
class Recipe(PlanOptions):
    """The options of a build that a YAML file may hold; paths in it are from the working directory."""

    weights: Annotated[
        WeightStorage, Option(BASICS, "Copy checkpoint files that need no conversion, or hard-link them.")
    ] = WeightStorage.COPY
    min_tokens_per_head: _MinTokensPerHead = EvictionConfig.min_tokens_per_head
    lookahead_steps: _LookaheadSteps = EvictionConfig.lookahead_steps
    calibrate: Annotated[
        Path | None,
        Option(
            NUMBERS,
            "With int4 and int8, round weights with regard to the model's activations on this text: a UTF-8 file of "
            "some thousand words, like what the model will read.",
        ),
    ] = None
    calibration_method: Annotated[
        Method,
        Option(
            NUMBERS,
            "With --calibrate, scale channels by their size (awq), and also let columns take back the errors of those "
            "before (gptq), which is closer to the floats and takes longer.",
        ),
    ] = Method.AWQ
    engine_weights: Annotated[
        EngineWeights,
        Option(
            TENSORRT,
            "Keep weights in the engine (included), read them from the package when it is opened (stripped), or stream "
            "those that the GPU cannot hold (streamed).",
        ),
    ] = EngineWeights.INCLUDED
    timing_cache: Annotated[
        Path | None, Option(TENSORRT, "Read TensorRT's measurements from this file, and write new ones to it.")
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device is None and self.max_batch != 1 and not self.target.decodes_in_tensorrt:
            raise OptionError(
                f"max-batch {self.max_batch} is for the plan of a device: name one with --device, or build with "
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
        if self.mixed is not None and self.calibrate is None:
            raise OptionError(
                f"mixed {self.mixed:g} needs --calibrate FILE: which matrices int4 harms most is measured on a text"
            )
        if self.calibrate is None and self.calibration_method is not Method.AWQ:
            raise OptionError(f"calibration-method {self.calibration_method} needs --calibrate FILE, its text")
        if self.calibrate is not None and not self.precision.weight_only:
            raise OptionError(
                f"calibrate {self.calibrate} is for --precision int4 and int8; {self.precision} rounds no weights"
            )

    def eviction(self, policy: Policy) -> EvictionConfig:
        """The eviction policy; `policy` is used where the options leave it open."""
        return replace(
            super().eviction(policy), min_tokens_per_head=self.min_tokens_per_head, lookahead_steps=self.lookahead_steps
        )


@dataclass(frozen=True, kw_only=True)
class BuildOptions(Recipe):
    """What `trimkv-export build` takes."""

    output: Annotated[Path, Option(BASICS, "Write the package to this folder. Default: NAME-mBUDGET.")]
    overwrite: Annotated[bool, Option(BASICS, "Replace a package that is there already.")] = False
