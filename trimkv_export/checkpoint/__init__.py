"""Find, read and check the two halves of a checkpoint: backbone and gates. No torch, and no weights in memory."""

from trimkv_export.checkpoint.aliases import ALIASES, Alias
from trimkv_export.checkpoint.backbone import Backbone, open_backbone
from trimkv_export.checkpoint.check import FLOAT_DTYPES, check_tensors
from trimkv_export.checkpoint.gates import GATE_KINDS, GateConfig, Gates, check_gates_fit, open_gates, read_gate_config
from trimkv_export.checkpoint.locate import Location, locate, locate_configs
from trimkv_export.checkpoint.quantized import StoredQuantization, read_quantization
from trimkv_export.checkpoint.safetensors_file import read_header
from trimkv_export.checkpoint.shipped import shipped_folder
from trimkv_export.checkpoint.tensors import TensorInfo
from trimkv_export.checkpoint.torch_file import read_torch_file

__all__ = [
    "ALIASES",
    "FLOAT_DTYPES",
    "GATE_KINDS",
    "Alias",
    "Backbone",
    "GateConfig",
    "Gates",
    "Location",
    "StoredQuantization",
    "TensorInfo",
    "check_gates_fit",
    "check_tensors",
    "locate",
    "locate_configs",
    "open_backbone",
    "open_gates",
    "read_gate_config",
    "read_header",
    "read_quantization",
    "read_torch_file",
    "shipped_folder",
]
