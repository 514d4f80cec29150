"""The package on disk: what `build` writes and everything else reads (docs/design.md, section 7)."""

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from trimkv_export.checkpoint.gates import POLICIES
from trimkv_export.config import (
    MAX_COUNT,
    MAX_FRAMES,
    MAX_IMAGE_PIXELS,
    MOST_IMAGE_PIXELS,
    EngineWeights,
    EvictionConfig,
    Precision,
    Quantization,
)
from trimkv_export.errors import OptionError, PackageError
from trimkv_export.files import is_file, is_folder, open_regular, read_regular
from trimkv_export.models import VisionSpec
from trimkv_export.models.base.limits import LIMITS, MAX_INT32, MAX_WIDTH
from trimkv_export.models.base.reader import ACTIVATIONS
from trimkv_export.package.fields import read_fields
from trimkv_export.package.graph_file import external_files
from trimkv_export.policy import CacheSpec, plan_slab
from trimkv_export.text.resolve import TextInfo
from trimkv_export.text.tokenizer import Tokenizer
from trimkv_export.words import shorten

__all__ = [
    "CONFIG",
    "DECODER",
    "DECODER_ENGINE",
    "FORMAT",
    "FORMAT_VERSION",
    "LLM_FOLDER",
    "PLAN",
    "VISION",
    "VISION_ENGINE",
    "CompanionInfo",
    "EngineInfo",
    "ModelInfo",
    "Package",
    "PackageConfig",
    "QuantizationMethod",
    "RopeInfo",
    "VisionInfo",
    "hash_file",
    "is_package",
    "parser_file",
    "replaceable",
    "require_utf8",
]

FORMAT = "trimkv-export"
# A reader refuses another major version; a minor one only adds. In 2.4 cache_bytes became what is allocated, and 2.5
# added companions, the limits of pictures, the matrices that stay in float, and bits of the head and of single ones.
FORMAT_VERSION = "2.5"
CONFIG, DECODER, VISION, PLAN = "config.json", "decoder.onnx", "vision.onnx", "memory_plan.json"
DECODER_ENGINE, VISION_ENGINE = "decoder.engine", "vision.engine"
LLM_FOLDER = "tensorrt-llm"
# Files up to this size are hashed whenever a package is opened; weights only by `verify`.
QUICK_BYTES = 64 << 20
CHUNK_BYTES = 8 << 20
MAX_CONFIG_BYTES = 16 << 20  # a config.json has some thousand
GRAPH_SUFFIX = ".onnx"

ByteProgress = Callable[[int], None]


def hash_file(path: Path, progress: ByteProgress | None = None) -> str:
    """Hexadecimal sha256 of a file, read in chunks."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with open_regular(path) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            if progress:
                progress(count)
    return digest.hexdigest()


def parser_file(graph: Path) -> Path:
    """The graph as TensorRT's parser takes it, next to the graph that it was made from."""
    return graph.with_suffix(f".tensorrt{graph.suffix}")


@dataclass(frozen=True)
class RopeInfo:
    """The decoder's rotary embedding; fields as in `models.Rope`."""

    rope_type: str
    inverse_frequencies: Sequence[float]
    attention_scaling: float
    axes: Sequence[int] | None


@dataclass(frozen=True)
class ModelInfo:
    """What the runtime, the plan and a reader want to know of the decoder; fields as in `models.DecoderSpec`.

    Attributes:
        max_position_embeddings: positions that this package is for.
        gate_kind: "rg" (TrimKV) or "rg10" (DBTrimKV).
        gate_intermediate_size: width of the gate's hidden layers.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    hidden_act: str
    rope: RopeInfo
    tie_word_embeddings: bool
    qk_norm: bool
    fused_projections: bool
    prefix: str
    deepstack_layers: int
    gate_kind: str
    gate_intermediate_size: int


@dataclass(frozen=True, kw_only=True)
class VisionInfo(VisionSpec):
    """The vision tower, as in `models.VisionSpec`, and the tokens that stand for its output, as in `VisualTokens`.

    Whether positions have three axes is in `ModelInfo.rope.axes`.

    Attributes:
        max_image_tokens: the most tokens of one image.
        weight_bytes: of the tower alone.
        max_image_pixels: the most pixels of an image in its file that a run takes, from format 2.5 on.
        max_frames: the most frames of a video that it takes, from format 2.5 on.
    """

    image_token_id: int
    video_token_id: int | None
    vision_start_token_id: int | None
    vision_end_token_id: int | None
    max_image_tokens: int
    weight_bytes: int
    max_image_pixels: int = MAX_IMAGE_PIXELS
    max_frames: int = MAX_FRAMES

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """The tokens that stand for image and, if the model takes them, video features."""
        return (self.image_token_id,) if self.video_token_id is None else (self.image_token_id, self.video_token_id)


@dataclass(frozen=True)
class EngineInfo:
    """The TensorRT engines of a package. A TensorRT-RTX package has one for the vision tower alone.

    Attributes:
        version: of the TensorRT that built them.
        max_batch: the most rows of a decode step.
        weights: where the engines have them.
    """

    version: str
    max_batch: int
    weights: EngineWeights


@dataclass(frozen=True)
class QuantizationMethod:
    """How quantised weights were made.

    Attributes:
        name: least-squares, tensor by tensor (before format 2.5 rtn, rounded to nearest); awq or gptq, with regard to
            activations (quantization/calibration.py); or imported-gptq and the like, from a checkpoint that was
            quantised already.
        text_sha256: of the calibration text of awq and gptq.
        text_tokens: how many tokens of it were used.
        int8: with --mixed, the matrices that are in int8 among others in int4.
    """

    name: str
    text_sha256: str | None = None
    text_tokens: int | None = None
    int8: Sequence[str] | None = None


@dataclass(frozen=True)
class CompanionInfo:
    """What `build` made of the files that lie with a model's weights.

    Attributes:
        text: special tokens and chat templates; None: there is no tokenizer, and the package reads no text.
        images: how images are processed, the fields of a `vision.processor_config` class; None: it reads none.
        videos: the same of videos.
    """

    text: TextInfo | None = None
    images: Mapping[str, Any] | None = None
    videos: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class PackageConfig:
    """config.json of a package.

    Attributes:
        precision: of activations, keys and values, and of the weights that are not quantised.
        weight_bytes: all weights, the vision tower's included.
        quantization: how the decoder's linear layers are stored; None if they are not quantised.
        quantization_method: how they were quantised, from format 2.2 on.
        device: the name of the one that the build was held to.
        engine: None where ONNX Runtime runs everything.
        companions: from format 2.5 on; None: what the files say when they are opened.
        files: name -> {"bytes", "sha256"} of what the package holds.
        inputs: the same of what it was built from.
    """

    model: ModelInfo
    eviction: EvictionConfig
    precision: Precision
    prefill_chunk: int
    target: str
    source: Mapping[str, Any]
    producer: Mapping[str, str]
    weight_bytes: int
    vision: VisionInfo | None = None
    quantization: Quantization | None = None
    quantization_method: QuantizationMethod | None = None
    device: str | None = None
    engine: EngineInfo | None = None
    companions: CompanionInfo | None = None
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    inputs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """The tokens that stand for pictures, which no text has; none without a vision tower."""
        return self.vision.placeholder_ids if self.vision else ()

    @property
    def cache(self) -> CacheSpec:
        """The cache that the package allocates per sequence."""
        return CacheSpec(
            num_layers=self.model.num_layers,
            num_kv_heads=self.model.num_kv_heads,
            head_dim=self.model.head_dim,
            budget=self.eviction.budget,
            evict_every=self.eviction.evict_every,
            kv_dtype=self.precision.dtype,
        )

    @property
    def numbers(self) -> str:
        """The element types in words."""
        found = self.quantization
        if found is None:
            return str(self.precision)
        zeros = "" if found.symmetric else ", with zero points"
        head = f", head in int{found.head_bits}" if found.head and found.head_bits else ""
        method = self.quantization_method
        mixed = f", {len(method.int8):,} matrices in int8" if method and method.int8 else ""
        scales = "with one scale a row" if found.per_row else f"in blocks of {found.block_size}"
        return f"int{found.bits} weights {scales}{zeros}{mixed}{head}, else {self.precision}"

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of everything else in config.json; names the build."""
        return str(self.as_dict()["config_sha256"])

    def as_dict(self) -> dict[str, Any]:
        """The content of config.json."""
        body = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        body["cache_bytes"] = plan_slab(self.cache).nbytes
        return {**body, "config_sha256": hashlib.sha256(_canonical(body)).hexdigest()}

    def dump(self) -> bytes:
        """config.json as it is written; `Package.open` accepts nothing else."""
        return _dump(self.as_dict())

    def graph_metadata(self) -> dict[str, str]:
        """What the graphs repeat, so that a graph and a config of different builds are not taken for one."""
        values = {**asdict(self.eviction), "prefill_chunk": self.prefill_chunk, "precision": self.precision}
        values |= {name: getattr(self.model, name) for name in ("num_layers", "num_kv_heads", "head_dim", "gate_kind")}
        return {f"trimkv.{name}": str(value) for name, value in values.items()}


def _dump(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, indent=2, ensure_ascii=False).encode() + b"\n"


def _sealed(body: Mapping[str, Any]) -> bool:
    rest = {name: value for name, value in body.items() if name != "config_sha256"}
    return bool(hashlib.sha256(_canonical(rest)).hexdigest() == body.get("config_sha256"))


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


@dataclass(frozen=True)
class Package:
    """An opened package: its folder and its config."""

    path: Path
    config: PackageConfig

    @classmethod
    def open(cls, path: Path | str) -> "Package":
        """Read and check everything but the content of large files.

        Raises:
            PackageError: the path is not UTF-8; or the folder is not a package, is of another major version, or was
                changed: a value or byte of config.json, the size of a file, the content of a file up to 64 MiB.
        """
        path = Path(path)
        require_utf8(path)
        config = _read_config(path)
        for name, entry in config.files.items():
            if not is_file(path / name):
                raise PackageError(f"{path}: {name} is missing; build the package again")
            with _reading(path / name):
                size = (path / name).stat().st_size
            if size != entry["bytes"]:
                raise PackageError(
                    f"{path}: {name} has {size:,} bytes, the build wrote {entry['bytes']:,}; "
                    "copy or build the package again"
                )
            if entry["bytes"] <= QUICK_BYTES or name.endswith(GRAPH_SUFFIX):
                cls._check_hash(path, name, entry)
        package = cls(path, config)
        for name in config.files:
            if name.endswith(GRAPH_SUFFIX):
                package._check_locations(name)
        return package

    def file(self, name: str) -> Path:
        """The path of a file of the package. Raises PackageError when config.json does not list it."""
        if name not in self.config.files:
            raise PackageError(f"{self.path}: {CONFIG} lists no {name}; build the package again")
        return self.path / name

    def open_tokenizer(self) -> Tokenizer:
        """Open the package's tokenizer.

        Raises:
            PackageError: it has none.
            MissingDependencyError: tokenizers is not installed.
        """
        said = self.config.companions
        return Tokenizer.open(self.path, self.config.files, said.text if said else None)

    def _check_locations(self, graph: str) -> None:
        """Raise PackageError if a graph takes weights from a file that is not one of the package's."""
        try:
            with _reading(self.path / graph):
                found = external_files(self.path / graph)
        except ValueError as error:
            raise PackageError(
                f"{self.path}: {graph} is not an ONNX graph ({error}); build the package again"
            ) from None
        folder = PurePosixPath(graph).parent
        if strangers := sorted(each for each in found if str(folder / each) not in self.config.files):
            raise PackageError(
                f"{self.path}: {graph} takes weights from {shorten(strangers[0])}, which {CONFIG} does not list; build "
                "the package again"
            )

    @staticmethod
    def _check_hash(path: Path, name: str, entry: Mapping[str, Any], progress: ByteProgress | None = None) -> None:
        with _reading(path / name):
            found = hash_file(path / name, progress)
        if found != entry["sha256"]:
            raise PackageError(
                f"{path}: {name} was changed after the build (sha256 {found[:12]}…, expected {entry['sha256'][:12]}…); "
                "copy or build the package again"
            )

    def large_files(self) -> Iterator[tuple[str, int]]:
        """Name and bytes of the files that `open` did not read."""
        for name, entry in self.config.files.items():
            if entry["bytes"] > QUICK_BYTES:
                yield name, entry["bytes"]

    def verify_large_files(self, progress: ByteProgress | None = None) -> None:
        """Hash what `open` left out.

        Raises:
            PackageError: a file was changed; the first one is named.
        """
        for name, _ in self.large_files():
            self._check_hash(self.path, name, self.config.files[name], progress)


def require_utf8(path: Path) -> None:
    """Refuse a path that runtimes, which take text, cannot open.

    Raises:
        PackageError: it is not UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise PackageError(f"{str(path)!a}: is not UTF-8 text, and no runtime can open it; rename the folder") from None


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one PackageError."""
    try:
        yield
    except OSError as error:
        raise PackageError(f"{file}: cannot be read ({error.strerror or error}): check its permissions") from None


def is_package(folder: Path) -> bool:
    """Whether `build` wrote this folder, in any version, even if it was changed since."""
    return _body(folder) is not None


def replaceable(folder: Path) -> bool | str:
    """Whether `build` wrote all that is in this folder.

    False: it is no package. A text: the name of a file or folder in it that is somebody else's. Hidden ones do not
    count, for programs that copy folders leave such, and nor do files of a package whose list is damaged.
    """
    body = _body(folder)
    files = None if body is None else body.get("files")
    if not isinstance(files, dict):
        return body is not None
    known = {CONFIG, *files} | {parent.as_posix() for name in files for parent in PurePosixPath(name).parents}
    try:
        for found in sorted(folder.rglob("*")):
            name = found.relative_to(folder)
            if name.as_posix() not in known and not any(part.startswith(".") for part in name.parts):
                return name.as_posix()
    except OSError:  # it was replaced, or removed, while this looked; whoever asked looks again
        return True
    return True


def _body(folder: Path) -> dict[str, Any] | None:
    """What the config.json of a package holds; None if the folder has none of a package."""
    try:
        body = json.loads(read_regular(folder / CONFIG, MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) and body.get("format") == FORMAT else None


def _read_config(path: Path) -> PackageConfig:
    file = path / CONFIG
    if not is_folder(path):
        raise PackageError(f"{path}: no such folder; make a package with `trimkv-export build`")
    try:
        raw = read_regular(file, MAX_CONFIG_BYTES)
        body = json.loads(raw)
    except FileNotFoundError:
        raise PackageError(
            f"{path}: no {CONFIG}, so this is not a package; make one with `trimkv-export build`"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise PackageError(f"{file}: cannot be read as JSON ({error}); build the package again") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        what = "a checkpoint" if isinstance(body, dict) and "model_type" in body else "another file"
        raise PackageError(f"{file}: this is {what}, not the config of a package; make one with `trimkv-export build`")
    version = str(body.get("format_version"))
    if version.split(".")[0] != FORMAT_VERSION.split(".")[0]:
        raise PackageError(
            f"{file}: package format {shorten(version)} cannot be read, this version reads {FORMAT_VERSION}; "
            "build the package again"
        )
    try:
        # What a minor version added has a default, and is not in the packages of an earlier one.
        ours = {each.name for each in fields(PackageConfig)}
        config = read_fields(PackageConfig, {name: value for name, value in body.items() if name in ours})
        _check_sizes(config)
        # A newer minor version may say more than this one knows; then its own hash has to do.
        known = version == FORMAT_VERSION
        intact = config.dump() == raw if known else _sealed(body) and _dump(body) == raw
    except (ValueError, RecursionError) as error:  # OptionError is a ValueError; others: a lone surrogate, deep lists
        raise PackageError(f"{file}: was changed after the build ({error!s}); build the package again") from None
    if not intact:
        raise PackageError(
            f"{file}: was changed after the build (its own sha256 does not match); build the package again "
            "with other options instead of editing it"
        )
    return config


def _check_sizes(config: PackageConfig) -> None:
    """Check what the types of config.json's values leave open: sizes, and what must go together.

    Raises:
        OptionError: a value is of no model that this version can run, or does not go with another.
    """
    model, cache = config.model, config.cache
    _within("model", model, LIMITS | {"rms_norm_eps": None, "max_position_embeddings": MAX_INT32})
    if model.num_heads % model.num_kv_heads:
        raise OptionError(f"model.num_heads ({model.num_heads}) is no multiple of num_kv_heads ({model.num_kv_heads})")
    for name, known in (("gate_kind", tuple(POLICIES)), ("hidden_act", ACTIVATIONS)):
        if getattr(model, name) not in known:
            raise OptionError(f"model.{name} must be one of {', '.join(known)}, got {shorten(getattr(model, name))}")
    frequencies, axes = len(model.rope.inverse_frequencies), model.rope.axes
    if not 1 <= frequencies <= model.head_dim // 2:
        raise OptionError(
            f"model.rope.inverse_frequencies has {frequencies} values, and a head_dim of {model.head_dim} has from 1 "
            f"to {model.head_dim // 2}"
        )
    if axes is not None and (len(axes) != frequencies or max(axes) > 2):
        raise OptionError(f"model.rope.axes must say 0, 1 or 2 for each frequency, got {shorten(axes)}")
    if model.deepstack_layers > model.num_layers:
        raise OptionError(f"model.deepstack_layers ({model.deepstack_layers}) is above num_layers ({model.num_layers})")
    if cache.num_slots > MAX_INT32:
        raise OptionError(
            f"a budget of {cache.budget:,} for {cache.num_streams:,} heads is {cache.num_slots:,} entries, and at most "
            f"{MAX_INT32:,} can be numbered; build with a smaller budget"
        )
    _within("the package", config, {"prefill_chunk": MAX_COUNT})
    _within("engine", config.engine, {"max_batch": MAX_COUNT})
    _within("quantization", config.quantization, {"bits": 8, "head_bits": 8, "block_size": MAX_WIDTH})
    if config.vision is not None:
        _check_vision(config.vision, model)
    for name, entry in config.files.items():
        _check_entry(name, entry)


VISION_LIMITS = {
    "max_image_tokens": MAX_COUNT, "max_image_pixels": MOST_IMAGE_PIXELS, "max_frames": MAX_COUNT, "norm_eps": None,
    "tokens_per_second": None,
}  # fmt: skip


def _check_vision(vision: VisionInfo, model: ModelInfo) -> None:
    _within("vision", vision, LIMITS | VISION_LIMITS)
    if vision.hidden_size % vision.num_heads or (vision.rotary and vision.head_dim % 4):
        raise OptionError(f"vision.hidden_size ({vision.hidden_size}) does not go with num_heads ({vision.num_heads})")
    if vision.image_size is not None and vision.image_size < vision.patch_size:
        raise OptionError(f"vision.image_size ({vision.image_size}) is below patch_size ({vision.patch_size})")
    if vision.window_side == 0:
        raise OptionError(f"vision.window_size ({vision.window_size}) is less than a token")
    if len(vision.deepstack_visual_indexes) != model.deepstack_layers:
        raise OptionError(
            f"vision.deepstack_visual_indexes has {len(vision.deepstack_visual_indexes)} values, and deepstack_layers "
            f"is {model.deepstack_layers}"
        )
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        token = getattr(vision, name)
        if token is not None and token >= model.vocab_size:
            raise OptionError(f"vision.{name} must be below vocab_size ({model.vocab_size}), got {token}")
    for name in ("block", "deepstack"):
        path = getattr(vision.modules, name)
        if path is not None and {"{", "}"} & set(path.replace("{}", "", 1)):
            raise OptionError(f"vision.modules.{name} must have one {{}} for a number, got {shorten(path)}")


# Field -> key of a Hugging Face config.json.
_KEYS = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads"}


def _within(path: str, values: Any, limits: Mapping[str, int | None]) -> None:
    """Check the fields that have a limit: from 1 to it, or above 0 where it is None."""
    for each in fields(values) if values is not None else ():
        key, value = _KEYS.get(each.name, each.name), getattr(values, each.name)
        if key in limits and value is not None:
            most = limits[key]
            if value <= 0 or (most is not None and value > most):
                limit = "above 0" if most is None else f"from 1 to {most:,}"
                raise OptionError(f"{path}.{each.name} must be {limit}, got {value:,}")


def _check_entry(name: str, entry: Mapping[str, Any]) -> None:
    """Check a line of `files`: a name inside the package, and what was written there."""
    parts = PurePosixPath(name).parts
    if not parts or "/".join(parts) != name or ".." in parts or "\0" in name:
        raise OptionError(f"files has {shorten(name)}, which is no name of a file in the package")
    if name == CONFIG:
        raise OptionError(f"files has {CONFIG}, which cannot have a hash of itself")
    nbytes, digest = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
    if type(nbytes) is not int or nbytes < 0 or not isinstance(digest, str):
        raise OptionError(f"files must have bytes and sha256 of {shorten(name)}, got {shorten(entry)}")
