"""Build a package: checkpoint -> graph -> folder. ONNX Runtime runs it; other targets add their engines."""

import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx

from trimkv_export import __version__
from trimkv_export.build.companions import checkpoint_companions
from trimkv_export.build.sources import check_backbone, named_backbone, wanted_weights
from trimkv_export.build.tensorrt import EngineBuilder
from trimkv_export.build.weights import FileRecord, Placement, place_weights
from trimkv_export.checkpoint import (
    Backbone,
    Gates,
    Location,
    check_gates_fit,
    locate,
    open_backbone,
    open_gates,
    read_quantization,
)
from trimkv_export.checks import is_unicode
from trimkv_export.config import BuildOptions, Policy, Target, WeightStorage
from trimkv_export.errors import CheckpointError, OptionError, OutputError, TrimKVError
from trimkv_export.files import emptied
from trimkv_export.graph import GateSpec, ModelGraph, build_decoder, build_vision
from trimkv_export.graph.check import check_graph
from trimkv_export.models import DecoderSpec, VisionSpec, VisualTokens, decoder_spec, vision_spec
from trimkv_export.package import (
    CONFIG,
    DECODER,
    PLAN,
    VISION,
    ModelInfo,
    PackageConfig,
    QuantizationMethod,
    RopeInfo,
    VisionInfo,
    hash_file,
    replaceable,
)
from trimkv_export.package.staging import staged_folder
from trimkv_export.plan import plan_memory
from trimkv_export.plan.fit import fitting_plan
from trimkv_export.plan.planner import ModelPlan, ModelWorkload, check_image_tokens, model_workload, planned_videos
from trimkv_export.policy import plan_slab
from trimkv_export.quantization.calibration import calibrate, random_tokens
from trimkv_export.quantization.calibration_text import read_calibration_text
from trimkv_export.quantization.imported import imported_quantization
from trimkv_export.quantization.rounding import chosen_quantization
from trimkv_export.quantization.wanted import Wanted

__all__ = ["BuildReport", "Progress", "build_package"]

# (a sentence about what the package will not be able to do); called before weights are read.
Tell = Callable[[str], None]
# (what is being done, how much is done, how much there is); called often, from one thread.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BuildReport:
    """What a build made.

    Attributes:
        path: the package.
        config: its config.json.
        notes: what the checkpoint lacks, a sentence each.
    """

    path: Path
    config: PackageConfig
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For `build --json`. Bytes are exact; a linked weight file counts in `package_bytes` as if copied."""
        cache, config = self.config.cache, self.config
        context = config.model.max_position_embeddings
        return {
            "package": str(self.path),
            "model_type": config.model.model_type,
            "gate_kind": config.model.gate_kind,
            "precision": str(config.precision),
            "quantization": asdict(config.quantization) if config.quantization else None,
            "quantization_method": asdict(config.quantization_method) if config.quantization_method else None,
            "numbers": config.numbers,
            "eviction": asdict(config.eviction),
            "prefill_chunk": config.prefill_chunk,
            "target": config.target,
            "engines": [name for name in config.files if name.endswith(".engine")],
            "device": config.device,
            "package_bytes": sum(int(entry["bytes"]) for entry in config.files.values()),
            "weight_bytes": config.weight_bytes,
            "cache_bytes": plan_slab(cache).nbytes,
            "full_cache_context": context,
            "full_cache_bytes": cache.full_cache_nbytes(context),
            "notes": list(self.notes),
        }


def build_package(
    options: BuildOptions, progress: Progress = lambda *_: None, tell: Tell = lambda _: None
) -> BuildReport:
    """Build the package that `options` describes and return what was made.

    Whatever is raised, nothing is left at the output.

    Args:
        options: what to build.
        progress: see `Progress`.
        tell: see `Tell`.

    Raises:
        OptionError: an option that the model, the checkpoint, the device or the target cannot have.
        CheckpointError: as `checkpoint.locate`, and for tensors that are missing or do not fit the model.
        UnsupportedModelError: a model that this version, or the target, does not know.
        OutputError: the package cannot be written.
        MissingDependencyError: TensorRT, or the tokenizers that calibration needs, are not installed.
        EngineError: TensorRT cannot build an engine.
    """
    for name in ("model", "gates", "output"):
        _require_text(str(getattr(options, name)), OptionError, name)
    engines = None if options.target is Target.ONNXRUNTIME else EngineBuilder(options, progress)
    text = read_calibration_text(options.calibrate) if options.calibrate else None
    fitted = fitting_plan(options)
    # The small files tell whether the model can be built; only then are gigabytes fetched.
    first = locate(options.model, options.gates, revision=options.revision, weights=False)
    _check_output(options.output, first)
    config_file, source = first.backbone / CONFIG, open_backbone(first.backbone, weights=False).config
    spec, vision = decoder_spec(source, config_file, options.context), vision_spec(source, config_file)
    stored = read_quantization(source, config_file)
    if stored and text:
        raise OptionError(
            f"calibrate {text.path}: {config_file} is of a checkpoint that is quantised already ({stored.method}), and "
            "taken as it is; leave out --calibrate, or take the original"
        )
    quantization = chosen_quantization(options, stored, config_file, spec)
    if engines:
        engines.check_model(spec.model_type, has_tower=vision is not None)
    check_image_tokens(vision[0] if vision else None, options.max_image_tokens)
    # Its own bytes are known when its weights are.
    sight = _vision_info(*vision, options) if vision else None
    companions, files = checkpoint_companions(first.backbone, spec.vocab_size, sight)
    for note in companions.notes:
        tell(note)
    location = locate(options.model, options.gates, revision=options.revision)
    backbone, gates = named_backbone(open_backbone(location.backbone), config_file), open_gates(location.gates)
    for weights in (*backbone.files, *gates.files):
        _require_text(weights.name, CheckpointError, f"{weights.parent}: the name of a weight file")
    if quantization and stored:
        quantization = imported_quantization(quantization, stored, spec, backbone.tensors)
    check_gates_fit(gates, num_layers=spec.num_layers, num_kv_heads=spec.num_kv_heads, hidden_size=spec.hidden_size)
    eviction = options.eviction(Policy(gates.policy))
    gate = GateSpec(gates.kind, gates.intermediate_size)
    decoder = partial(build_decoder, spec, gate, eviction, options.compute, quantization)
    graphs = {DECODER: decoder()}
    if vision:
        graphs[VISION] = build_vision(vision[0], options.compute)
    for graph in graphs.values():
        check_graph(graph.model)
    check_backbone(backbone, spec, vision[0] if vision else None, stored)
    wanted = wanted_weights(graphs, spec, backbone, gates, stored)
    method, tokens = None, text.tokens(backbone.path, spec.vocab_size) if text else None
    if quantization:
        method = QuantizationMethod(f"imported-{stored.method}" if stored else "least-squares")
    if text and tokens is not None:
        method = QuantizationMethod(str(options.calibration_method), text.sha256, len(tokens))

    config = PackageConfig(
        model=_model_info(spec, gates),
        eviction=eviction,
        precision=options.compute,
        quantization=quantization,
        quantization_method=method,
        prefill_chunk=options.prefill_chunk,
        target=str(options.target),
        source={
            "model": location.backbone_id or options.model,
            "gates": location.gates_id or options.gates or options.model,
            "trained_budget": gates.memory_size,
        },
        producer={
            "trimkv-export": __version__,
            **{name: importlib.metadata.version(name) for name in ("onnx", "numpy", "ml_dtypes")},
        },
        weight_bytes=sum(tensor.nbytes for tensor in wanted.values()),
        vision=replace(sight, weight_bytes=_vision_bytes(wanted)) if sight else None,
        device=fitted.profile.name if fitted and fitted.profile else None,
        companions=companions.info,
    )
    with staged_folder(options.output, overwrite=options.overwrite, ours=replaceable) as stage:
        _check_space(stage, wanted, options.weights)
        rounded = stage / "rounded"  # what calibration has rounded, until it is placed
        if tokens is None and quantization and quantization.bits == 4 and not stored:
            # How large the inputs of a matrix are depends more on the model than on the text.
            calibrated = calibrate(spec, wanted, random_tokens(spec), partial(progress, "calibration"), method=None)
            wanted |= {name: replace(wanted[name], adjustment=found) for name, found in calibrated.adjustments.items()}
        if method is not None and tokens is not None:
            rounded.mkdir()
            calibrated = calibrate(
                spec, wanted, tokens, partial(progress, "calibration"),
                method=options.calibration_method, mixed=options.mixed, folder=rounded,
            )  # fmt: skip
            if calibrated.int8 is not None:
                graphs[DECODER] = decoder(wide=calibrated.int8)
                check_graph(graphs[DECODER].model)
                wanted = wanted_weights(graphs, spec, backbone, gates, stored)
                config = replace(
                    config,
                    quantization_method=replace(method, int8=calibrated.int8),
                    weight_bytes=sum(tensor.nbytes for tensor in wanted.values()),
                )
            wanted |= {name: replace(wanted[name], adjustment=found) for name, found in calibrated.adjustments.items()}
        total = sum(file.stat().st_size for file in {tensor.source.file for tensor in wanted.values()})
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress("weights", done, total)

        placement = place_weights(wanted, backbone.files, stage, options.weights, advance)
        shutil.rmtree(rounded, ignore_errors=True)
        for file, graph in graphs.items():
            onnx.helper.set_model_props(graph.model, config.graph_metadata())
            _set_locations(graph, placement)
            emptied(stage / file).write_bytes(graph.model.SerializeToString(deterministic=True))
        for name, content in files.items():
            (stage / name).parent.mkdir(exist_ok=True)
            emptied(stage / name).write_bytes(content)
        one_run = replace(options.plan_options(), max_batch=1, context=None)
        wide = (config.quantization_method and config.quantization_method.int8) or ()
        tower = vision[0] if vision else None
        videos = planned_videos(location.backbone, tower)
        workload = model_workload(spec, tower, gate, one_run, quantization, videos=videos, wide=wide)
        plan = _memory_plan(config, workload, fitted)
        emptied(stage / PLAN).write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
        if engines:
            config = engines.add(stage, config, fitted)
        config = replace(config, files=_records(stage, placement.outputs), inputs=_inputs(placement, backbone, gates))
        emptied(stage / CONFIG).write_bytes(config.dump())
    return BuildReport(options.output, config, companions.notes)


def _require_text(name: str, error: type[TrimKVError], what: str) -> None:
    """Raise an error of this type for a name that is no text: config.json records it."""
    if not is_unicode(name):
        raise error(f"{what} is not UTF-8 text: {name!a}; rename it")


def _check_output(output: Path, location: Location) -> None:
    """Raise OutputError if the package would replace the checkpoint, or lie in its folder or around it."""
    target = output.resolve()
    for source in (location.backbone.resolve(), location.gates.resolve()):
        if target == source or target in source.parents or source in target.parents:
            relation = "is" if target == source else "holds" if target in source.parents else "lies in"
            raise OutputError(f"{output}: {relation} the checkpoint's folder {source}; choose another --output")


def _model_info(spec: DecoderSpec, gates: Gates) -> ModelInfo:
    common = {name: getattr(spec, name) for name in ModelInfo.__dataclass_fields__ if hasattr(spec, name)}
    rope = RopeInfo(**{name: getattr(spec.rope, name) for name in RopeInfo.__dataclass_fields__})
    return ModelInfo(
        **common | {"rope": rope},
        gate_kind=gates.kind,
        gate_intermediate_size=gates.intermediate_size,
    )


def _vision_info(spec: VisionSpec, tokens: VisualTokens, options: BuildOptions) -> VisionInfo:
    return VisionInfo(
        **vars(spec), **asdict(tokens), weight_bytes=0, max_image_tokens=options.max_image_tokens,
        max_image_pixels=options.max_image_pixels, max_frames=options.max_frames,
    )  # fmt: skip


def _vision_bytes(wanted: Mapping[str, Wanted]) -> int:
    return sum(tensor.nbytes for tensor in wanted.values() if tensor.data_file.startswith(VISION))


def _check_space(stage: Path, wanted: Mapping[str, Wanted], storage: WeightStorage) -> None:
    """Refuse early what cannot fit. A linked file costs nothing, so only converted tensors count then."""
    need = sum(tensor.nbytes for tensor in wanted.values() if storage is WeightStorage.COPY or not tensor.as_is)
    free = shutil.disk_usage(stage).free
    if need > free:
        raise OutputError(
            f"{stage.parent}: the package needs {need:,} bytes and {free:,} are free; free some space, or build with "
            "--weights link where no conversion is needed"
        )


def _set_locations(graph: ModelGraph, placement: Placement) -> None:
    for tensor in graph.model.graph.initializer:
        location = placement.locations[tensor.name]
        values = {"location": location.file, "offset": str(location.offset), "length": str(location.nbytes)}
        for key, value in values.items():
            tensor.external_data.add(key=key, value=value)


def _memory_plan(config: PackageConfig, workload: ModelWorkload, fitted: ModelPlan | None) -> dict[str, Any]:
    """Bytes of weights and cache, the slab of one sequence, and the plan of a run: on the CPU, and on the device."""
    context, slab = config.model.max_position_embeddings, plan_slab(config.cache)
    return {
        "weight_bytes": config.weight_bytes,
        "vision_weight_bytes": config.vision.weight_bytes if config.vision else 0,
        "cache_bytes": slab.nbytes,
        "full_cache_bytes": config.cache.full_cache_nbytes(context),
        "full_cache_context": context,
        "slab": slab.as_dict(),
        "plan": plan_memory(workload.work).as_dict() | {"peaks": workload.peaks_dict()},
        "device_plan": fitted.as_dict() if fitted else None,
    }


def _records(stage: Path, known: Mapping[str, FileRecord]) -> dict[str, dict[str, Any]]:
    out = {}
    for file in sorted(path for path in stage.rglob("*") if path.is_file()):
        name = file.relative_to(stage).as_posix()
        record = known.get(name) or FileRecord(file.stat().st_size, hash_file(file))
        out[name] = {"bytes": record.nbytes, "sha256": record.sha256}
    return out


def _inputs(placement: Placement, backbone: Backbone, gates: Gates) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}

    def add(folder: str, files: Iterable[Path]) -> None:
        for file in files:
            record = placement.inputs.get(file) or FileRecord(file.stat().st_size, hash_file(file))
            out[f"{folder}/{file.name}"] = {"bytes": record.nbytes, "sha256": record.sha256}

    add("model", [backbone.path / CONFIG, *backbone.files])
    add("gates", [gates.path / CONFIG, *gates.files])
    return out
