"""Compare the tensors of a checkpoint with those a model needs."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from trimkv_export.checkpoint.tensors import TensorInfo
from trimkv_export.errors import CheckpointError
from trimkv_export.words import shorten

__all__ = ["FLOAT_DTYPES", "check_names", "check_tensors", "quote_some"]

FLOAT_DTYPES = ("float32", "float16", "bfloat16")
MAX_QUOTED = 5


def check_tensors(
    found: Mapping[str, TensorInfo],
    expected: Mapping[str, tuple[int, ...]],
    *,
    where: Path,
    packed: Mapping[str, tuple[int, ...]] | None = None,
    ignore: Callable[[str], bool] = lambda _: False,
) -> None:
    """Check that `found` holds exactly the tensors of `expected`, of those shapes, in a dtype of `FLOAT_DTYPES`.

    Args:
        found: tensors of the checkpoint.
        expected: name -> shape.
        where: file or folder that messages name.
        packed: name -> shape of tensors of int32 that must be there too.
        ignore: says whether a tensor with this name, which is not expected, may be there.

    Raises:
        CheckpointError: missing or unexpected names, a wrong shape, or another dtype.
    """
    packed = packed or {}
    wanted = {**expected, **packed}
    check_names(found, wanted, where=where, ignore=ignore)
    shapes = [
        f"{shorten(name)} is {list(found[name].shape)}, expected {list(shape)}"
        for name, shape in wanted.items()
        if found[name].shape != shape
    ]
    if shapes:
        raise CheckpointError(f"{where}: wrong shape: {_some(shapes)}: the weights do not belong to this config.json")
    dtypes = [f"{shorten(name)} is {found[name].dtype}" for name in expected if found[name].dtype not in FLOAT_DTYPES]
    if dtypes:
        raise CheckpointError(
            f"{where}: wrong dtype: {_some(dtypes)}: use weights in {', '.join(FLOAT_DTYPES)} (not quantised)"
        )
    dtypes = [f"{shorten(name)} is {found[name].dtype}" for name in packed if found[name].dtype != "int32"]
    if dtypes:
        raise CheckpointError(f"{where}: wrong dtype: {_some(dtypes)}: quantised weights are packed into int32")


def check_names(
    found: Iterable[str],
    expected: Iterable[str],
    *,
    where: Path,
    ignore: Callable[[str], bool] = lambda _: False,
) -> None:
    """Check the names alone; arguments and error as in `check_tensors`."""
    have, want = dict.fromkeys(found), dict.fromkeys(expected)
    missing = [name for name in want if name not in have]
    unexpected = [name for name in have if name not in want and not ignore(name)]
    found_faults = (("missing", missing), ("unexpected", unexpected))
    faults = [f"{kind} {quote_some(names)}" for kind, names in found_faults if names]
    if faults:
        raise CheckpointError(f"{where}: {'; '.join(faults)}: {_diagnosis(missing, unexpected)}")


# What names of tensors that were not expected say: parts of them -> what they are and what to do.
_SIGNS = {
    (".lora_A.", ".lora_B.", ".lora_magnitude_vector", "base_model.model."): (
        "these are the weights of an adapter (LoRA): merge it into its base with peft's merge_and_unload, and save that"
    ),
    (".absmax", ".quant_map", ".quant_state.", ".SCB"): (
        "the weights are quantised by bitsandbytes, which is not supported: take the checkpoint that is not quantised"
    ),
    (".weight_scale_inv", ".input_scale"): (
        "the weights are quantised to fp8, which is not supported: take the checkpoint that is not quantised"
    ),
    (".qweight", ".qzeros", ".scales", ".g_idx", ".weight_packed", ".weight_scale", ".weight_zero_point"): (
        "the weights of these modules are quantised, and config.json does not say so, or says it otherwise: fetch "
        "config.json and the weights again, of one version"
    ),
    (".k_scale", ".v_scale", ".kv_scale"): (
        "these are scales of a KV cache in fp8, which is not supported: take the checkpoint without them"
    ),
    (".qkv_proj.", ".gate_up_proj.", ".W_pack.", ".query_key_value."): (
        "the projections are fused, and config.json names a family that has them apart: they are of different models"
    ),
    (".experts.", ".block_sparse_moe.", ".shared_expert"): (
        "the layers are mixtures of experts, and config.json says that they are dense"
    ),
    ("score.", "classifier.", "v_head.", "value_head.", "reward_head.", "embedding_head."): (
        "the model has a head for classification or rewards, and here it needs one for text (lm_head)"
    ),
    ("vision_tower.", "visual.", "vision_model.", "multi_modal_projector."): (
        "the weights are of a model with vision, and config.json describes another"
    ),
    (".retention_gate.",): "the gates have parts that this kind of gate has not, or lack some",
    (".q_norm.", ".k_norm."): "the weights are of a family that norms queries and keys, and config.json names another",
}
_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "model.model.", "transformer.", "language_model.")
_FALLBACK = "the weights do not match config.json, or the download is incomplete"


def _diagnosis(missing: list[str], unexpected: list[str]) -> str:
    """What is wrong, as far as the names say."""
    for wrapper in _WRAPPERS:
        if missing and sum(name.startswith(wrapper) for name in unexpected) > len(unexpected) // 2:
            return (
                f"names begin with {wrapper!r}, as programs that wrap a model save it: load it there, and save what is "
                "inside"
            )

    def shows(name: str, sign: str) -> bool:
        return sign in f".{name}" if sign[0] == "." else name.startswith(sign)

    for signs, said in _SIGNS.items():
        if any(shows(name, sign) for name in unexpected for sign in signs):
            return said
    if missing == ["lm_head.weight"]:
        return (
            "there is no head: if it is the embedding, set tie_word_embeddings to true in config.json; else the "
            "checkpoint was saved without it (AutoModel, and not AutoModelForCausalLM)"
        )
    if unexpected and not missing and all(".layers." in f".{name}" for name in unexpected):
        return "config.json says fewer layers (num_hidden_layers), or parts of layers, than the weights have"
    if missing and not unexpected:
        return "the download is incomplete, or config.json is of a larger model: fetch both again"
    return _FALLBACK


def quote_some(names: Iterable[str]) -> str:
    """The first few names in quotes: "'a', 'b' and 7 more"."""
    return _some([shorten(name, 200) for name in names])


def _some(items: list[str]) -> str:
    more = f" and {len(items) - MAX_QUOTED} more" if len(items) > MAX_QUOTED else ""
    return ", ".join(items[:MAX_QUOTED]) + more
