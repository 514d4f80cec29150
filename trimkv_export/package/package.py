"""The package on disk: what `build` writes and everything else reads (docs/design.md, section 7)."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from trimkv_export.config import EngineWeights, EvictionConfig, Precision, Quantization
from trimkv_export.errors import OptionError, PackageError
from trimkv_export.models import VisionModules, VisionSpec
from trimkv_export.policy import CacheSpec, plan_slab

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
]

FORMAT = "trimkv-export"
# A reader refuses another major version; a minor one only adds. In 2.4 cache_bytes became what is allocated.
FORMAT_VERSION = "2.4"
CONFIG, DECODER, VISION, PLAN = "config.json", "decoder.onnx", "vision.onnx", "memory_plan.json"
DECODER_ENGINE, VISION_ENGINE = "decoder.engine", "vision.engine"
LLM_FOLDER = "tensorrt-llm"
# Files up to this size are hashed whenever a package is opened; weights only by `verify`.
QUICK_BYTES = 64 << 20
CHUNK_BYTES = 8 << 20

ByteProgress = Callable[[int], None]


def hash_file(path: Path, progress: ByteProgress | None = None) -> str:
    """Hexadecimal sha256 of a file, read in chunks."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
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
    """

    image_token_id: int
    video_token_id: int | None
    vision_start_token_id: int | None
    vision_end_token_id: int | None
    max_image_tokens: int
    weight_bytes: int

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
        name: rtn, rounded to nearest; awq, with regard to activations (quantization/calibration.py); or imported-gptq
            and the like, from a checkpoint that was quantised already.
        text_sha256: of the calibration text of awq.
        text_tokens: how many tokens of it were used.
    """

    name: str
    text_sha256: str | None = None
    text_tokens: int | None = None


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
        return f"int{found.bits} weights in blocks of {found.block_size}{zeros}, else {self.precision}"

    @property
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
            PackageError: the folder is not a package, is of another major version, or was changed: a value or byte of
                config.json, the size of a file, the content of a file up to 64 MiB.
        """
        path = Path(path)
        config = _read_config(path)
        for name, entry in config.files.items():
            file = path / name
            if not file.is_file():
                raise PackageError(f"{path}: {name} is missing; build the package again")
            if file.stat().st_size != entry["bytes"]:
                raise PackageError(
                    f"{path}: {name} has {file.stat().st_size:,} bytes, the build wrote {entry['bytes']:,}; "
                    "copy or build the package again"
                )
            if entry["bytes"] <= QUICK_BYTES:
                cls._check_hash(path, name, entry)
        return cls(path, config)

    @staticmethod
    def _check_hash(path: Path, name: str, entry: Mapping[str, Any], progress: ByteProgress | None = None) -> None:
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


def is_package(folder: Path) -> bool:
    """Whether `build` wrote this folder, in any version, even if it was changed since."""
    try:
        body = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(body, dict) and body.get("format") == FORMAT


def _read_config(path: Path) -> PackageConfig:
    file = path / CONFIG
    if not path.is_dir():
        raise PackageError(f"{path}: no such folder; make a package with `trimkv-export build`")
    try:
        raw = file.read_bytes()
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
            f"{file}: package format {version!r} cannot be read, this version reads {FORMAT_VERSION}; "
            "build the package again"
        )
    try:
        # What a minor version added has a default, and is not in the packages of an earlier one.
        values = {f.name: body[f.name] for f in fields(PackageConfig) if f.name in body or f.default is MISSING}
        values["model"] = ModelInfo(**values["model"] | {"rope": RopeInfo(**values["model"]["rope"])})
        if values.get("vision") is not None:
            modules = VisionModules(**values["vision"]["modules"])
            values["vision"] = VisionInfo(**values["vision"] | {"modules": modules})
        if values.get("engine") is not None:
            engine = values["engine"]
            values["engine"] = EngineInfo(**engine | {"weights": EngineWeights(engine["weights"])})
        if values.get("quantization") is not None:
            values["quantization"] = Quantization(**values["quantization"])
        if values.get("quantization_method") is not None:
            values["quantization_method"] = QuantizationMethod(**values["quantization_method"])
        values["eviction"] = EvictionConfig(**values["eviction"])
        values["precision"] = Precision(values["precision"])
        config = PackageConfig(**values)
        # A newer minor version may say more than this one knows; then its own hash has to do.
        known = version == FORMAT_VERSION
        intact = config.dump() == raw if known else _sealed(body) and _dump(body) == raw
    except (KeyError, TypeError, ValueError, OptionError) as error:
        raise PackageError(f"{file}: was changed after the build ({error!s}); build the package again") from None
    if not intact:
        raise PackageError(
            f"{file}: was changed after the build (its own sha256 does not match); build the package again "
            "with other options instead of editing it"
        )
    return config
