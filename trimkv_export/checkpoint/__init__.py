"""Find, read and check the two halves of a checkpoint: backbone and gates. No torch, and no weights in memory."""

from trimkv_export.checkpoint.aliases import ALIASES
from trimkv_export.checkpoint.backbone import Backbone, open_backbone
from trimkv_export.checkpoint.check import check_tensors
from trimkv_export.checkpoint.gates import Gates, check_gates_fit, open_gates, read_gate_config
from trimkv_export.checkpoint.locate import Location, locate, locate_configs
from trimkv_export.checkpoint.quantized import StoredQuantization, read_quantization
from trimkv_export.checkpoint.shipped import shipped_folder
from trimkv_export.checkpoint.tensors import TensorInfo

__all__ = [
    "ALIASES",
    "Backbone",
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
    "read_quantization",
    "shipped_folder",
]
