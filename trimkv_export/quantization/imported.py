"""Which matrices of a checkpoint that is quantised already are so in the package, and in blocks of which size."""

from collections.abc import Collection
from dataclasses import replace

from trimkv_export.checkpoint import StoredQuantization
from trimkv_export.config import Quantization
from trimkv_export.errors import OptionError
from trimkv_export.graph import LM_HEAD
from trimkv_export.models import DecoderSpec

__all__ = ["imported_quantization", "is_stored", "linear_weights"]

ROW_BLOCKS = (128, 64, 32, 16)  # columns of a block where a whole row has one scale


def linear_weights(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """The matrices of the layers, and a head of its own: name -> shape. They may be quantised in a checkpoint."""
    return {name: shape for name, shape in spec.tensors().items() if name.endswith("_proj.weight") or name == LM_HEAD}


def is_stored(stored: StoredQuantization, name: str, tensors: Collection[str] | None) -> bool:
    """Whether the weight `name` is quantised in the checkpoint.

    Args:
        stored: how the checkpoint is quantised.
        name: of a weight of `linear_weights`.
        tensors: names of the checkpoint's tensors, which say it; None where there are none, and config.json does.
    """
    if tensors is None:
        return stored.head if name == LM_HEAD else not stored.leaves_in_float(name.removesuffix(".weight"))
    if stored.tensors(name, (0, 0))["qweight"][0] in tensors:
        return True
    return name not in tensors and name != LM_HEAD


def imported_quantization(
    chosen: Quantization, stored: StoredQuantization, spec: DecoderSpec, tensors: Collection[str] | None = None
) -> Quantization:
    """The format of the package.

    Modules that the checkpoint has in float stay so, and one whose columns do not divide into blocks becomes float. A
    head that the checkpoint has quantised is taken as it is, with the embedding in float unless the options want it
    rounded.

    Args:
        chosen: of the options and the checkpoint's method.
        stored: how the checkpoint is quantised.
        spec: the decoder.
        tensors: as for `is_stored`.

    Raises:
        OptionError: the options want a head that the checkpoint has quantised in other bits.
    """
    weights = linear_weights(spec)
    quantised = {name: shape[1] for name, shape in weights.items() if is_stored(stored, name, tensors)}
    size = chosen.block_size
    if stored.group_size is None:  # the largest block that serves every matrix that any serves
        divisible = [columns for columns in quantised.values() if columns % ROW_BLOCKS[-1] == 0]
        size = next(size for size in ROW_BLOCKS if all(columns % size == 0 for columns in divisible))
    floats = [name for name in weights if name not in quantised and name != LM_HEAD]
    floats += [name for name, columns in quantised.items() if columns % size]
    head = chosen.head
    if LM_HEAD in quantised and head and chosen.head_bits:
        raise OptionError(
            f"head int{chosen.head_bits}: this checkpoint has a head in int{chosen.bits} ({stored.method}), which is "
            f"taken as it is; take --head int{chosen.bits}, or leave it out"
        )
    if LM_HEAD in quantised and LM_HEAD not in floats and not head:
        head = True
        floats.append(f"{spec.prefix}embed_tokens.weight")
    return replace(chosen, block_size=size, head=head, floats=tuple(floats))
