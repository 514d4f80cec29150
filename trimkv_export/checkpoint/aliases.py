"""Short names of checkpoints: one word for a backbone and its gates on the Hugging Face hub, or of this program."""

from dataclasses import dataclass

__all__ = ["ALIASES", "Alias", "find_alias"]


@dataclass(frozen=True)
class Alias:
    """A short name, and what it stands for.

    Attributes:
        name: the short name.
        backbone: its hub repository, as `owner/name`.
        gates: theirs; or `examples/…`, a folder that comes with this program (`shipped.bundled_gates`).
    """

    name: str
    backbone: str
    gates: str


# A plain name means DBTrimKV (global budget) where that exists for the backbone, else TrimKV;
# where both exist, TrimKV is NAME-trimkv.
_ROWS = (
    Alias("qwen3-1.7b", "Qwen/Qwen3-1.7B", "ngocbh/TrimKV-Qwen3-1.7B-Math"),
    Alias("qwen3-4b", "Qwen/Qwen3-4B", "ngocbh/DBTrimKV-Qwen3-4B-Math"),
    Alias("qwen3-4b-trimkv", "Qwen/Qwen3-4B", "ngocbh/TrimKV-Qwen3-4B-Math"),
    Alias("qwen3-8b", "Qwen/Qwen3-8B", "ngocbh/TrimKV-Qwen3-8B-Math"),
    Alias("qwen3-14b", "Qwen/Qwen3-14B", "ngocbh/TrimKV-Qwen3-14B-Math"),
    Alias("qwen3-4b-instruct-2507", "Qwen/Qwen3-4B-Instruct-2507", "ngocbh/DBTrimKV-Qwen3-4B-Instruct-2507"),
    Alias("qwen3-4b-instruct-2507-trimkv", "Qwen/Qwen3-4B-Instruct-2507", "ngocbh/TrimKV-Qwen3-4B-Instruct-2507"),
    Alias("qwen3-vl-4b", "Qwen/Qwen3-VL-4B-Instruct", "ngocbh/DBTrimKV-Qwen3-VL-4B-Instruct"),
    Alias("qwen3-vl-8b", "Qwen/Qwen3-VL-8B-Thinking", "ngocbh/DBTrimKV-Qwen3-VL-8B-Thinking"),
    Alias("phi-3-mini-128k", "microsoft/Phi-3-mini-128k-instruct", "ngocbh/TrimKV-Phi-3-mini-128k-instruct"),
    Alias(
        "deepseek-r1-distill-llama-8b",
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        "ngocbh/TrimKV-DeepSeek-R1-Distill-Llama-8B",
    ),
    Alias("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", "examples/smollm2/gates"),
)

ALIASES: dict[str, Alias] = {alias.name: alias for alias in _ROWS}


def find_alias(name: str) -> Alias | None:
    """Return the alias of that name, in any letter case."""
    return ALIASES.get(name.lower())
