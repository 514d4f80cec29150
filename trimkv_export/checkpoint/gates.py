"""Open retention gates: config.json and the weights of the small MLPs, in the layout of the official checkpoints.

Keys are `{prefix}layers.{N}.self_attn.retention_gate.{part}`. Kind "rg" (TrimKV) has two linear layers, "rg10"
(DBTrimKV) three, of which `linear3` is one module shared by all layers. A folder may also hold the backbone and its
gates in the same files.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimkv_export.checkpoint.backbone import has_backbone, read_weights
from trimkv_export.checkpoint.check import check_names, check_tensors, quote_some
from trimkv_export.checkpoint.config_file import read_config
from trimkv_export.checkpoint.config_keys import BACKBONE_KEYS, HARMLESS, refuse_unknown
from trimkv_export.checkpoint.safetensors_file import read_header
from trimkv_export.checkpoint.tensors import TensorInfo
from trimkv_export.checkpoint.torch_file import read_torch_file
from trimkv_export.checks import require_whole
from trimkv_export.errors import CheckpointError, UnsupportedModelError
from trimkv_export.words import shorten

__all__ = [
    "GateConfig",
    "Gates",
    "check_gates_fit",
    "gate_shapes",
    "is_gates_folder",
    "open_gates",
    "read_gate_config",
]

POLICIES = {"rg": "per_head", "rg10": "global"}  # by kind of gate

WEIGHTS_SAFETENSORS = "trimkv_weights.safetensors"
WEIGHTS_TORCH = "trimkv_weights.pth"
PREFIXES = ("model.", "model.language_model.", "")
KEY = re.compile(r"(.*?)layers\.([0-9]{1,4})\.self_attn\.retention_gate\.(.+)", re.DOTALL)
MAX_LAYERS = 10_000  # what KEY can number
SHARED_PART = "linear3.weight"


@dataclass(frozen=True)
class GateConfig:
    """What config.json says of gates.

    Attributes:
        kind: "rg" (TrimKV) or "rg10" (DBTrimKV).
        intermediate_size: i, width of the gate's hidden layers.
        memory_size: M at training, kept entries per stream; None where config.json does not say it.
    """

    kind: str
    intermediate_size: int
    memory_size: int | None

    @property
    def policy(self) -> str:
        """How streams compete for the budget: "per_head" for rg, "global" for rg10."""
        return POLICIES[self.kind]

    def parameters(self, *, num_layers: int, num_kv_heads: int, hidden_size: int) -> int:
        """Parameters of all layers' gates; `linear3` counts once."""
        shapes = gate_shapes(self.kind, num_kv_heads, self.intermediate_size, hidden_size)
        return sum(math.prod(shape) * (1 if part == SHARED_PART else num_layers) for part, shape in shapes.items())


@dataclass(frozen=True, kw_only=True)
class Gates(GateConfig):
    """Opened gates; their sizes are those of the weights.

    Attributes:
        path: their folder.
        num_layers: decoder layers, each with a gate.
        num_kv_heads: H, outputs of each gate.
        hidden_size: d, inputs of each gate.
        base_model: the backbone that config.json names: a hub id or a folder.
        layers: per layer, part -> tensor: "bias" [H], "linear1.weight" [i, d], "linear1.bias" [i] and, for rg,
            "linear2.weight" [H, i]; for rg10, "linear2.weight" [i, i], "linear2.bias" [i] and "linear3.weight" [H, i],
            which is the same tensor in every layer (the last layer's, as the official loader leaves it).
        files: the weight files.
    """

    path: Path
    num_layers: int
    num_kv_heads: int
    hidden_size: int
    base_model: str | None
    layers: tuple[Mapping[str, TensorInfo], ...]
    files: tuple[Path, ...]


def open_gates(path: Path) -> Gates:
    """Read config.json and locate every gate tensor.

    The weights are, in this order of preference: trimkv_weights.safetensors (no pickle), trimkv_weights.pth, a single
    other *.safetensors, and the gates among the weights of a backbone.

    Raises:
        CheckpointError: config.json or weights are missing, corrupt, do not match each other, or have keys, shapes or
            dtypes other than those of the gate kind.
        UnsupportedModelError: config.json names an unknown gate kind.
    """
    config = read_config(path)
    _check_keys(path, config)
    weights, found = _weights(path, config)
    kind = _kind(path, config, found)
    layers, (num_kv_heads, intermediate_size, hidden_size) = _layers(weights, config, kind, found)
    return Gates(
        path=path,
        kind=kind,
        num_layers=len(layers),
        num_kv_heads=num_kv_heads,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        base_model=base_model_of(config),
        memory_size=_whole(path, config, "memory_size"),
        layers=layers,
        files=tuple(sorted({tensor.file for layer in layers for tensor in layer.values()})),
    )


def read_gate_config(path: Path, config: Mapping[str, Any], default_intermediate_size: int) -> GateConfig:
    """What the config.json of gates says, without their weights.

    Args:
        path: the folder that config.json lies in, for messages.
        config: its content.
        default_intermediate_size: for configs that do not say it.

    Raises:
        CheckpointError: it names no gate kind, or a size that is not a whole number above 0.
        UnsupportedModelError: it names an unknown gate kind.
    """
    kind = _field(config, "retention_gate")
    if kind is None:
        raise CheckpointError(f"{path / 'config.json'}: names no retention_gate: is this the folder of the gates?")
    _check_kind(path, kind)
    _check_keys(path, config)
    size = _whole(path, config, "retention_gate_intermediate_size") or default_intermediate_size
    return GateConfig(kind, size, _whole(path, config, "memory_size"))


def is_gates_folder(path: Path) -> bool:
    """Whether a folder holds gates: their weights under the official name, or a config.json that names a gate kind.

    Raises:
        CheckpointError: config.json cannot be read.
    """
    if (path / WEIGHTS_SAFETENSORS).exists() or (path / WEIGHTS_TORCH).exists():
        return True
    return (path / "config.json").exists() and _field(read_config(path), "retention_gate") is not None


def base_model_of(config: Mapping[str, Any]) -> str | None:
    """The backbone that the config.json of gates names; None where it names none."""
    value = _field(config, "base_model")
    return value if isinstance(value, str) and value else None


def check_gates_fit(gates: Gates, *, num_layers: int, num_kv_heads: int, hidden_size: int) -> None:
    """Check that gates belong to a backbone of these dimensions.

    Raises:
        CheckpointError: a dimension differs; both values are quoted.
    """
    pairs = (
        ("layers", gates.num_layers, num_layers),
        ("KV heads", gates.num_kv_heads, num_kv_heads),
        ("hidden size", gates.hidden_size, hidden_size),
    )
    faults = [f"{what} {ours} and {theirs}" for what, ours, theirs in pairs if ours != theirs]
    if faults:
        trained = f"these gates were trained for {gates.base_model!r}"
        hint = trained if gates.base_model else "use the gates' own backbone"
        raise CheckpointError(f"{gates.path}: gates and backbone differ: {', '.join(faults)}: {hint}")


def _weights(path: Path, config: Mapping[str, Any]) -> tuple[Path, dict[str, TensorInfo]]:
    """The file of the weights, or their folder, and what it holds."""
    for name in (WEIGHTS_SAFETENSORS, WEIGHTS_TORCH):
        if (path / name).exists():
            return path / name, (read_torch_file if name == WEIGHTS_TORCH else read_header)(path / name)
    others = sorted(path.glob("*.safetensors"))
    if has_backbone(path):
        found = read_weights(path, config)
        return path, {name: tensor for name, tensor in found.items() if ".retention_gate." in name}
    if len(others) == 1:
        return others[0], read_header(others[0])
    fault = f"has {quote_some(file.name for file in others)}" if others else "has no gate weights"
    raise CheckpointError(f"{path}: {fault}: expected {WEIGHTS_SAFETENSORS} or {WEIGHTS_TORCH}")


def _check_keys(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse keys that are neither of gates nor of the backbone, whose own config counts."""
    for name, found in (("", config), ("text_config.", config.get("text_config"))):
        if isinstance(found, Mapping):
            refuse_unknown(found, BACKBONE_KEYS | HARMLESS, path / "config.json", name)
    if _field(config, "retention_gate") == "rg10" and _field(config, "tie_retention_gate_layers") is False:
        raise UnsupportedModelError(
            f"{path / 'config.json'}: tie_retention_gate_layers False is not supported; supported: true, one linear3 "
            "for the gates of all layers"
        )


def _field(config: Mapping[str, Any], name: str) -> Any:
    """A config field, from `text_config` first (where vision models keep theirs); None if absent or null."""
    text_config = config.get("text_config")
    if isinstance(text_config, Mapping) and text_config.get(name) is not None:
        return text_config[name]
    return config.get(name)


def _whole(path: Path, config: Mapping[str, Any], name: str) -> int | None:
    """A config field that is a whole number above 0, perhaps written as a float (512.0); None if absent."""
    value = _field(config, name)
    if value is None:
        return None
    if type(value) is float and value.is_integer():
        value = int(value)
    return require_whole(f"{path / 'config.json'}: {name}", value, 1, 2**31 - 1, error=CheckpointError)


def _kind(path: Path, config: Mapping[str, Any], found: Mapping[str, TensorInfo]) -> str:
    """The gate kind of config.json, checked against the keys; that of the keys alone if config.json has none."""
    named = _field(config, "retention_gate")
    if named is not None:
        _check_kind(path, named)
    of_keys = "rg10" if any(name.endswith(f".retention_gate.{SHARED_PART}") for name in found) else "rg"
    if named not in (None, of_keys):
        raise CheckpointError(
            f"{path}: config.json says retention_gate {named!r}, and the weights are those of {of_keys!r}: they do not "
            "belong together; fetch both again"
        )
    return of_keys


def _check_kind(path: Path, kind: Any) -> None:
    if not isinstance(kind, str) or kind not in POLICIES:
        raise UnsupportedModelError(
            f"{path}: its gates are of kind {shorten(kind)}, and this version knows {', '.join(POLICIES)}"
        )


def gate_shapes(kind: str, heads: int, inner: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Part -> shape of one gate: H = `heads` outputs, width i = `inner`, d = `hidden` inputs."""
    first = {"bias": (heads,), "linear1.weight": (inner, hidden), "linear1.bias": (inner,)}
    if kind == "rg":
        return {**first, "linear2.weight": (heads, inner)}
    return {**first, "linear2.weight": (inner, inner), "linear2.bias": (inner,), SHARED_PART: (heads, inner)}


def _layers(
    weights: Path, config: Mapping[str, Any], kind: str, found: Mapping[str, TensorInfo]
) -> tuple[tuple[Mapping[str, TensorInfo], ...], tuple[int, int, int]]:
    """The layers' tensors, checked, and (heads, intermediate size, hidden size)."""
    matches = [match for name in found if (match := KEY.fullmatch(name)) and match[1] in PREFIXES]
    if not matches:
        raise CheckpointError(
            f"{weights}: holds no retention gate (expected keys such as "
            f"'model.layers.0.self_attn.retention_gate.bias'; found {quote_some(found) or 'nothing'})"
        )
    configured, last = _whole(weights.parent, config, "num_hidden_layers"), max(int(match[2]) for match in matches)
    num_layers = configured or last + 1
    if not last < num_layers <= MAX_LAYERS:
        raise CheckpointError(
            f"{weights}: has gates up to layer {last}, and config.json says num_hidden_layers {configured}: they do "
            "not belong together; fetch both again"
        )
    stems = [f"{matches[0][1]}layers.{layer}.self_attn.retention_gate." for layer in range(num_layers)]
    parts = gate_shapes(kind, 1, 1, 1)
    check_names(found, [stem + part for stem in stems for part in parts], where=weights)

    bias, linear1 = found[stems[0] + "bias"].shape, found[stems[0] + "linear1.weight"].shape
    if len(bias) != 1 or len(linear1) != 2 or 0 in bias + linear1:
        raise CheckpointError(
            f"{weights}: the gate of layer 0 has a bias of shape {list(bias)} and a linear1.weight of shape "
            f"{list(linear1)}, expected [KV heads] and [intermediate size, hidden size]"
        )
    dimensions = (bias[0], *linear1)
    shapes = gate_shapes(kind, *dimensions)
    check_tensors(found, {stem + part: shape for stem in stems for part, shape in shapes.items()}, where=weights)
    # linear3 is one module: the official loader copies each layer's tensor into it in turn, so the last one stays.
    source = {part: stems[-1:] * num_layers if part == SHARED_PART else stems for part in parts}
    layers = tuple({part: found[source[part][layer] + part] for part in parts} for layer in range(num_layers))
    return layers, dimensions
