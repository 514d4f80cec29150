"""The memory plan of a model: from its config.json alone, over the real graphs."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimkv_export.checkpoint import locate_configs, open_backbone, read_gate_config, read_quantization
from trimkv_export.checkpoint.config_file import read_config
from trimkv_export.checkpoint.gates import POLICIES
from trimkv_export.compat import Self
from trimkv_export.config import EvictionConfig, PlanOptions, Policy, Precision, Quantization
from trimkv_export.errors import OptionError, PackageError, UnsupportedModelError
from trimkv_export.graph import LM_HEAD, GateSpec, ModelGraph, build_decoder, build_vision, cache_spec
from trimkv_export.graph.functions import GATE_FUNCTIONS, LOG_SIGMOID
from trimkv_export.graph.functions.vision_attention import VISION_ATTENTION
from trimkv_export.graph.ops import DOMAIN
from trimkv_export.models import DecoderSpec, VisionSpec, decoder_spec, gate_intermediate_size, vision_spec
from trimkv_export.plan import DeviceProfile, MemoryPlan, Peak, Workload, device, host_memory, plan_memory
from trimkv_export.plan.activations import graph_activations
from trimkv_export.policy import CacheSpec
from trimkv_export.quantization.imported import imported_quantization
from trimkv_export.quantization.rounding import chosen_quantization
from trimkv_export.vision.image_files import READ_BYTES
from trimkv_export.vision.processor_config import FrameProcessorConfig, VideoProcessorConfig
from trimkv_export.vision.videos import held_pixels

__all__ = [
    "ModelPlan",
    "ModelWorkload",
    "PictureSizes",
    "check_image_tokens",
    "plan_model",
    "planned_videos",
    "window_tokens",
]

MIB = 1 << 20
# Python, NumPy, ONNX Runtime 1.32, the tokenizers library and the command line, above an empty interpreter: `run` and
# `bench` of the demo package took 82 to 87 MB more than the other parts of its plan.
CPU_RUNTIME_BYTES = 86 * 10**6
# A BPE tokenizer while it is read (tokenizers 0.23): 35.9 MB measured for 32,000 tokens, 161 MB for 151,643.
TOKENIZER_BYTES = 1064
# float16 on ONNX Runtime's CPU provider: weights are folded to float32 and parts of them kept twice; measured.
CPU_HALF_FACTOR = 2.4
# What ONNX Runtime's CPU kernel of MultiHeadAttention takes beyond inputs and output, in outputs: query, key and value
# with the heads first; in fp16, which it lacks, these and all four tensors in float32. Measured (1.32, 1,024 to 8,192
# patches, 8 and 16 heads of 64, 1 to 4 threads): 3.02 to 3.24 and 13.06 to 13.6; what is above is 0.6 MB a thread.
ATTENTION_SCRATCH = {Precision.FP32: 3, Precision.FP16: 13}
SHOWN = 8  # tensors of a peak
SEGMENT, ROWS = 512, 16  # of the CPU attention kernel (plugins/cpu/pool_attention.cc)


@dataclass(frozen=True)
class PictureSizes:
    """The largest pictures that a plan is for.

    Attributes:
        tokens: of one image, or of a temporal patch of a video.
        image_pixels: of an image as it is in its file.
        frames: that are taken of a video.
    """

    tokens: int
    image_pixels: int
    frames: int

    @classmethod
    def of(cls, options: PlanOptions) -> Self:
        """Those that the options name."""
        return cls(options.max_image_tokens, options.max_image_pixels, options.max_frames)


@dataclass(frozen=True)
class TowerPlan:
    """The vision tower, ready for plans of any size of picture.

    Attributes:
        parameters: how many the tower has.
        nbytes: sizes -> bytes of weights, activations, pixels and features, and in the host's memory, of what is
            decoded and of the frames that are held; it does not fall when a size grows.
        peak: tokens of one image -> the tensors that make the peak of activations.
    """

    parameters: int
    nbytes: Callable[[PictureSizes], int]
    peak: Callable[[int], Peak]


@dataclass(frozen=True)
class ModelWorkload:
    """What a model asks of a device, ready for plans of any batch, chunk and budget.

    Attributes:
        work: the parts of the plan.
        parameters: of backbone, gates and vision tower; a tied head and shared gate weights count once.
        peaks: the tensors that make the peak of activations, at prefill, at decode and in the vision tower.
        vision: the vision tower; None where the model has none.
    """

    work: Workload
    parameters: int
    peaks: Mapping[str, Peak]
    vision: TowerPlan | None = None

    def peaks_dict(self) -> dict[str, Any]:
        """Each peak's bytes and its largest tensors, for JSON."""
        return {
            phase: {"bytes": found.nbytes, "tensors": {tensor.name: tensor.nbytes for tensor in found.tensors[:SHOWN]}}
            for phase, found in self.peaks.items()
        }


@dataclass(frozen=True)
class ModelPlan:
    """A plan and what it is for."""

    plan: MemoryPlan
    workload: ModelWorkload
    options: PlanOptions
    profile: DeviceProfile | None
    model_type: str
    gate_kind: str
    cache: CacheSpec
    eviction: EvictionConfig

    def as_dict(self) -> dict[str, Any]:
        """For `plan --json`: the keys of the plan, and of what it was made."""
        return {
            "model": self.options.model,
            "model_type": self.model_type,
            "gate_kind": self.gate_kind,
            "precision": str(self.options.precision),
            "policy": str(self.eviction.policy),
            "evict_every": self.eviction.evict_every,
            "device": self.profile.name if self.profile else None,
            "parameters": self.workload.parameters,
            **self.plan.as_dict(),
            "peaks": self.workload.peaks_dict(),
        }


def plan_model(options: PlanOptions) -> ModelPlan:
    """Plan the model that `options` names. Reads config.json files only; those of aliases ship with this package.

    Raises:
        CheckpointError, UnsupportedModelError: the model cannot be read, or is of a kind that is not known.
        DownloadError: it is on a hub that cannot be reached.
        OptionError: an option does not go with the model or the device.
    """
    profile = device(options.device) if options.device is not None else None
    if profile is not None and profile.kind == "cpu" and options.compute is Precision.BF16:
        raise OptionError(
            "bf16 does not run on ONNX Runtime's CPU provider; take --precision fp32 or fp16, or the --device of a GPU"
        )
    location = locate_configs(options.model, options.gates, revision=options.revision)
    config, where = open_backbone(location.backbone, weights=False).config, location.backbone / "config.json"
    spec, vision = decoder_spec(config, where, options.context), vision_spec(config, where)
    check_image_tokens(vision[0] if vision else None, options.max_image_tokens)
    width = gate_intermediate_size(config, where)
    gate_config = read_gate_config(location.gates, read_config(location.gates), width)
    gate = GateSpec(gate_config.kind, gate_config.intermediate_size)
    eviction = options.eviction(Policy(gate_config.policy))
    stored = read_quantization(config, where)
    quantization = chosen_quantization(options, stored, where, spec)
    if quantization and stored:
        quantization = imported_quantization(quantization, stored, spec)
    tower = vision[0] if vision else None
    videos = planned_videos(location.backbone, tower)
    workload = model_workload(spec, tower, gate, options, quantization, profile, videos)
    memory = None if profile is None else profile.memory_bytes or host_memory()
    plan = plan_memory(workload.work, device_bytes=memory, bandwidth=profile.bandwidth if profile else None)
    return ModelPlan(plan, workload, options, profile, spec.model_type, gate.kind, workload.work.cache, eviction)


def check_image_tokens(vision: VisionSpec | None, max_image_tokens: int) -> None:
    """Raise OptionError if no image would be small enough, because all have the same size."""
    if vision is not None and vision.image_tokens > max_image_tokens:
        raise OptionError(
            f"each image of this model has {vision.image_size} x {vision.image_size} pixels and takes "
            f"{vision.image_tokens} tokens, and --max-image-tokens is {max_image_tokens}; take {vision.image_tokens}"
        )


def planned_videos(folder: Path, vision: VisionSpec | None) -> VideoProcessorConfig | None:
    """How a model's videos are processed, by the files in its folder, or by the official ones where there are none.

    None if it takes none.
    """
    if vision is None or vision.image_size is not None:
        return None
    kind = VideoProcessorConfig if vision.tokens_per_second is None else FrameProcessorConfig
    try:
        return kind.open(folder)
    except (PackageError, UnsupportedModelError):  # it cannot be used, as whoever reads a video is told
        return kind()


def model_workload(
    spec: DecoderSpec,
    vision: VisionSpec | None,
    gate: GateSpec,
    options: PlanOptions,
    quantization: Quantization | None,
    profile: DeviceProfile | None = None,
    videos: VideoProcessorConfig | None = None,
    wide: Collection[str] | None = None,
) -> ModelWorkload:
    """Sizes of everything, over the graphs that `build` writes.

    Args:
        spec: the decoder.
        vision: the vision tower; None where the model has none.
        gate: the retention gates.
        options: what the plan is asked for.
        quantization: of the decoder's linear layers.
        profile: None plans for ONNX Runtime's CPU provider, which runs no bf16: such a package is planned as for a GPU.
        videos: how videos are processed; None: the model takes none.
        wide: the matrices that are in int8 among others in int4. None, where --mixed is given, counts what that allows.
    """
    precision, itemsize = options.compute, options.compute.itemsize
    on_cpu = precision is not Precision.BF16 if profile is None else profile.kind == "cpu"
    eviction = options.eviction(Policy(POLICIES[gate.kind]))
    # Neither weights nor activations depend on the budget, and shape inference takes seconds for a large one.
    one = replace(eviction, budget=1, min_tokens_per_head=0)
    decoder = build_decoder(spec, gate, one, precision, quantization, wide or ())
    gates = [(DOMAIN, GATE_FUNCTIONS[gate.kind]), (DOMAIN, LOG_SIGMOID)]
    own = [output.name for output in decoder.model.graph.output]
    if not on_cpu:  # TensorRT's kernels read quantised weights as they lie; on a CPU the float matrix is made
        own += [node.output[0] for node in decoder.model.graph.node if node.op_type == "DequantizeLinear"]
    activations = graph_activations(decoder.model, gates, skip=own)
    cache = cache_spec(spec, eviction, precision)
    held = _arena if on_cpu else _exact

    def step_peak(batch: int, tokens: int) -> Peak:
        # At most, every token of a longer step is one of an image.
        return activations.peak(batch=batch, step=tokens, visual=batch * tokens if tokens > 1 else 0)

    def activation_bytes(batch: int, tokens: int, budget: int) -> int:
        return held(step_peak(batch, tokens).nbytes) + _workspace(cache, eviction, budget, batch, tokens)

    def io_bytes(batch: int, tokens: int) -> int:
        visual = tokens * (1 + spec.deepstack_layers) * spec.hidden_size * itemsize if vision else 0
        # Logits, and on the host what penalties count.
        words = spec.vocab_size * (2 if on_cpu else 1)
        return batch * (tokens * 8 * (4 if vision else 2) + words * 4 + visual)

    weight_bytes = _weight_bytes(decoder)
    if wide is None and options.mixed is not None:
        weight_bytes += _mixed_bytes(decoder, spec, options.mixed)
    # For TensorRT a quantised head is stored in addition to the embedding, tied or not.
    shared = spec.tie_word_embeddings and all(weight.name != LM_HEAD for weight in decoder.weights)
    embedding = next(weight.nbytes for weight in decoder.weights if weight.name == f"{spec.prefix}embed_tokens.weight")
    peaks = {
        "prefill": step_peak(options.max_batch, options.prefill_chunk),
        "decode": step_peak(options.max_batch, 1),
    }
    # Pictures are read into the host's memory, which is the device's on a CPU and a Jetson.
    reading = (on_cpu or bool(profile and profile.unified_memory), videos)
    tower = None if vision is None else _tower(spec, vision, precision, reading, on_cpu=on_cpu)
    if tower is not None:
        peaks["vision"] = tower.peak(options.max_image_tokens)
    work = Workload(
        # ONNX Runtime's CPU provider packs the matrix of a tied head and keeps the embedding too.
        weight_bytes=_on_device(weight_bytes, options.precision, on_cpu) + (embedding if on_cpu and shared else 0),
        cache=cache,
        activation_bytes=activation_bytes,
        batch=options.max_batch,
        prefill_chunk=options.prefill_chunk,
        context=options.context or spec.max_position_embeddings,
        vision_bytes=tower.nbytes(PictureSizes.of(options)) if tower else 0,
        io_bytes=io_bytes,
        reserve_bytes=_host_bytes(spec, profile, on_cpu=on_cpu) + (profile.reserve_bytes if profile else 0),
        weight_read_bytes=weight_bytes - (0 if shared else embedding),
    )
    parameters = _parameters(decoder) + (tower.parameters if tower else 0)
    if spec.tie_word_embeddings and not shared:
        parameters -= spec.vocab_size * spec.hidden_size
    return ModelWorkload(work, parameters, peaks, tower)


def _host_bytes(spec: DecoderSpec, profile: DeviceProfile | None, *, on_cpu: bool) -> int:
    """What the process takes on top of the model, where host memory is the device's; a Jetson's reserve has them."""
    if not on_cpu and not (profile and profile.unified_memory):
        return 0
    return (CPU_RUNTIME_BYTES if on_cpu else 0) + TOKENIZER_BYTES * spec.vocab_size


def _tower(
    spec: DecoderSpec,
    vision: VisionSpec,
    precision: Precision,
    reading: tuple[bool, VideoProcessorConfig | None],
    *,
    on_cpu: bool,
) -> TowerPlan:
    """Size the tower; `reading`: whether pictures are read into the device's memory, and how videos are processed."""
    (on_host, videos), merged = reading, vision.spatial_merge_size**2
    graph = build_vision(vision, precision)
    window = (vision.window_side or 0) ** 2 * merged
    # ONNX Runtime's CPU kernel of the standard Attention, which serves windows, has all their scores. Measured (1.32,
    # 64 to 256 windows of 64 patches, heads of 64 and 80): 0.9 to 1.2 outputs.
    windowed = math.ceil(window / vision.head_dim)
    scratch = {VISION_ATTENTION: ATTENTION_SCRATCH[precision], "Attention": windowed} if on_cpu else {}
    activations = graph_activations(graph.model, multiple_of={"patches": merged}, scratch=scratch)
    weights = _on_device(_weight_bytes(graph), precision, on_cpu)
    features = spec.hidden_size * (1 + spec.deepstack_layers) * precision.itemsize
    pixels = merged * vision.patch_dim * 4
    held = _arena if on_cpu else _exact

    def tower_peak(tokens: int) -> Peak:
        windows = math.ceil(window_tokens(tokens, vision.window_side) * merged / window) if vision.window_side else 0
        return activations.peak(frames=1, patches=tokens * merged, windows=windows, places=window, keys=window)

    def nbytes(sizes: PictureSizes) -> int:
        tokens = vision.image_tokens or sizes.tokens
        encoding = held(tower_peak(tokens).nbytes) + tokens * (features + pixels)
        if not on_host:
            return weights + encoding
        # A prompt's pictures are read, one after the other, before the tower sees any.
        frames = tokens * merged * vision.patch_size**2
        if videos is not None:
            frames = max(frames, held_pixels(videos, sizes.frames, tokens))
        return weights + 3 * frames + max(encoding, READ_BYTES * sizes.image_pixels)

    return TowerPlan(_parameters(graph), nbytes, tower_peak)


def window_tokens(tokens: int, side: int) -> int:
    """The most places that a picture of at most `tokens` takes in windows of side x side (vision.grid)."""

    def places(length: int) -> int:
        return math.ceil(length / side) * min(length, side)

    return max(places(short) * places(tokens // short) for short in range(1, math.isqrt(tokens) + 1))


def _weight_bytes(graph: ModelGraph) -> int:
    return sum(weight.nbytes for weight in graph.weights)


def _mixed_bytes(decoder: ModelGraph, spec: DecoderSpec, bits: float) -> int:
    """What `bits` a weight allow the layers beyond all in int4: at most, for whole matrices become int8."""
    ends = (LM_HEAD, f"{spec.prefix}embed_tokens.weight")
    forms = [(weight, weight.quantization) for weight in decoder.weights if weight.name not in ends]
    layers = [(weight, form) for weight, form in forms if form is not None]
    now = sum(weight.nbytes for weight, _ in layers)
    wide = sum(replace(weight, quantization=form.of_bits(8)).nbytes for weight, form in layers)
    allowed = math.floor(bits * sum(math.prod(weight.shape) for weight, _ in layers) / 8)
    return min(allowed, wide) - now


def _parameters(graph: ModelGraph) -> int:
    return sum(math.prod(weight.shape) for weight in graph.weights)


def _on_device(weight_bytes: int, precision: Precision, on_cpu: bool) -> int:
    return int(weight_bytes * CPU_HALF_FACTOR) if on_cpu and precision is Precision.FP16 else weight_bytes


def _exact(nbytes: int) -> int:
    return nbytes


def _arena(nbytes: int) -> int:
    """What ONNX Runtime's arena takes for a peak: it grows by 1, 2, 4, … MiB until all fits."""
    total, region = 0, MIB
    while total < nbytes:
        total, region = total + region, 2 * region
    return total


def _workspace(cache: CacheSpec, eviction: EvictionConfig, budget: int, batch: int, tokens: int) -> int:
    """Bytes that the native kernels work in (plugins/cpu): partial softmaxes of all layers, and the update's tables."""
    streams, slots = cache.num_streams, cache.num_streams * budget
    segments = slots // SEGMENT + streams
    attention = segments * ROWS * (cache.head_dim + 2) * 4 if tokens == 1 else 0
    candidates = slots + streams * (eviction.evict_every + tokens)
    return batch * attention + 21 * candidates + 16 * slots + 16 * streams
