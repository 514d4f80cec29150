"""Model-local functions: the portable bodies of the operators, and the gates."""

from trimkv_export.graph.functions.pool_attention import pool_attention_function
from trimkv_export.graph.functions.pool_update import pool_update_function
from trimkv_export.graph.functions.quantized import (
    MATMUL_BLOCKS,
    QUANTIZED_DOMAIN,
    QUANTIZED_EMBEDDING,
    QUANTIZED_LINEAR,
    quantized_functions,
)
from trimkv_export.graph.functions.retention_gate import (
    GATE_FUNCTIONS,
    GATE_WEIGHTS,
    LOG_SIGMOID,
    log_sigmoid_function,
    retention_gate_function,
)

__all__ = [
    "GATE_FUNCTIONS",
    "GATE_WEIGHTS",
    "LOG_SIGMOID",
    "MATMUL_BLOCKS",
    "QUANTIZED_DOMAIN",
    "QUANTIZED_EMBEDDING",
    "QUANTIZED_LINEAR",
    "log_sigmoid_function",
    "pool_attention_function",
    "pool_update_function",
    "quantized_functions",
    "retention_gate_function",
]
