"""trimkv-export: LLMs with learned KV-cache eviction, from checkpoint to deployed engine."""

__version__ = "0.1.0"

__all__ = ["__version__"]
