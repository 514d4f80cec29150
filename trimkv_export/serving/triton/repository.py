"""Write a model repository for Triton: one model, that holds the package, the runtime and its settings.

OUTPUT/NAME/config.pbtxt
           /1/model.py              for Triton's Python backend
             /package/              the package: hard links where the file system has them, else copies
             /trimkv_export/        the runtime, so that the server needs no other installation of it
"""

import re
import shutil
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trimkv_export.checks import require_whole
from trimkv_export.config import Precision
from trimkv_export.errors import OptionError
from trimkv_export.files import link_or_copy
from trimkv_export.package import CONFIG, DECODER_ENGINE, PLAN, Package, is_package
from trimkv_export.package.staging import staged_folder, writing
from trimkv_export.plan.check import stored_plan
from trimkv_export.policy import plan_slab
from trimkv_export.serving.options import ServingOptions
from trimkv_export.serving.requests import INPUTS, OUTPUTS, Field
from trimkv_export.words import shorten

__all__ = ["RepositoryReport", "config_pbtxt", "write_repository"]

SOURCE = Path(__file__).resolve().parents[2]
# What no layer up to this one imports.
LEFT_OUT = ("cli", "verify", "__main__.py", "__pycache__")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
CONFIG_PBTXT = "config.pbtxt"
REQUIRED = "text_input"
TEMPLATE = string.Template("""\
name: "$name"
backend: "python"
max_batch_size: 1
model_transaction_policy { decoupled: true }
instance_group [ { count: 1, kind: $kind } ]
input [
$inputs
]
output [
$outputs
]
$parameters
""")


@dataclass(frozen=True)
class RepositoryReport:
    """What was written.

    Attributes:
        path: the folder of the model.
        model: its name.
        cache_bytes: the cache slab of all rows, as it is allocated.
        conversation_bytes: the most that saved conversations take in addition.
    """

    path: Path
    model: str
    cache_bytes: int
    conversation_bytes: int


def write_repository(
    package: Path,
    output: Path,
    options: ServingOptions,
    *,
    name: str | None = None,
    environment: Path | None = None,
    overwrite: bool = False,
) -> RepositoryReport:
    """Write `output`/NAME; other models of the repository stay.

    Args:
        package: the package's folder.
        output: the repository's.
        options: how the package is served.
        name: of the model; default: the package folder's.
        environment: the virtual environment that the model runs in, a path on the server; default: the server's Python.
        overwrite: replace the model if it is there already.

    Raises:
        PackageError: `package` is not one.
        OptionError: a bad name, or options that the package cannot have.
        OutputError: the model exists, or cannot be written.
    """
    opened = Package.open(package)
    config = opened.config
    name = opened.path.resolve().name if name is None else name
    if not NAME.fullmatch(name):
        raise OptionError(
            f"the model's name must be letters, digits and characters of . _ -, got {shorten(name)}; pass --name"
        )
    _check_options(opened, options)
    parameters = options.parameters()
    if environment is not None:
        parameters["EXECUTION_ENV_PATH"] = str(environment)
    target = output / name
    with staged_folder(target, overwrite=overwrite, ours=_is_ours) as stage, writing(target):
        (stage / CONFIG_PBTXT).write_text(config_pbtxt(name, options.provider, parameters), encoding="utf-8")
        version = stage / "1"
        version.mkdir()
        shutil.copyfile(Path(__file__).with_name("model.py"), version / "model.py")
        shutil.copytree(SOURCE, version / SOURCE.name, ignore=shutil.ignore_patterns(*LEFT_OUT))
        (version / "package").mkdir()
        for file in (CONFIG, *config.files):
            link_or_copy(opened.path / file, version / "package" / file)
    cache_bytes = plan_slab(config.cache, options.max_sequences).nbytes
    return RepositoryReport(target, name, cache_bytes, options.max_conversations * config.cache.nbytes())


def _is_ours(folder: Path) -> bool:
    return (folder / CONFIG_PBTXT).is_file() and is_package(folder / "1" / "package")


def _check_options(package: Package, options: ServingOptions) -> None:
    """Raise OptionError for options with which the server could not load the package."""
    config, lowest = package.config, max(1, package.config.eviction.min_tokens_per_head)
    if options.budget:
        require_whole("budget", options.budget, lowest, config.eviction.budget, ", what the package was built for")
    require_whole("prefill_chunk", options.prefill_chunk, 0, config.prefill_chunk, ", what the package was built for")
    rows = options.max_sequences
    if options.provider == "tensorrt":
        if config.engine is None or DECODER_ENGINE not in config.files:
            raise OptionError(
                f"provider tensorrt: {package.path} has no TensorRT engine of the decoder; build it with --target "
                "tensorrt"
            )
        require_whole("max_sequences", rows, 1, config.engine.max_batch, ", what the engine was built for")
    elif options.provider == "cpu" and config.precision is Precision.BF16:
        raise OptionError("provider cpu: ONNX Runtime has no bfloat16 there; build with --precision fp32 or fp16")
    plan = stored_plan(package, "device_plan") or {}
    most = plan.get("max_sequences")
    if isinstance(most, int) and rows > most:
        raise OptionError(
            f"max_sequences must be at most {most}, what fits {config.device} (the package's {PLAN}); got {rows}"
        )


def config_pbtxt(name: str, provider: str, parameters: Mapping[str, str]) -> str:
    """The model's configuration, in protobuf's text format."""
    return TEMPLATE.substitute(
        name=name,
        kind="KIND_CPU" if provider == "cpu" else "KIND_GPU",
        inputs=",\n".join(_tensor(field, optional=field.name != REQUIRED) for field in INPUTS),
        outputs=",\n".join(_tensor(field) for field in OUTPUTS),
        parameters="\n".join(
            f"parameters {{ key: {_quote(key)} value {{ string_value: {_quote(value)} }} }}"
            for key, value in parameters.items()
        ),
    )


def _tensor(field: Field, *, optional: bool = False) -> str:
    dims = -1 if field.many else 1
    ending = ", optional: true" if optional else ""
    return f'  {{ name: "{field.name}", data_type: TYPE_{field.kind}, dims: [ {dims} ]{ending} }}'


def _quote(text: str) -> str:
    escaped = "".join(f"\\{byte:03o}" if byte < 0x20 or byte in b'"\\' else chr(byte) for byte in text.encode("utf-8"))
    return '"' + escaped.encode("latin-1").decode() + '"'
