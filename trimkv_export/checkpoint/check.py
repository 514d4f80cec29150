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
        raise CheckpointError(
            f"{where}: {'; '.join(faults)}: the weights do not match config.json, or the download is incomplete"
        )


def quote_some(names: Iterable[str]) -> str:
    """The first few names in quotes: "'a', 'b' and 7 more"."""
    return _some([shorten(name, 200) for name in names])


def _some(items: list[str]) -> str:
    more = f" and {len(items) - MAX_QUOTED} more" if len(items) > MAX_QUOTED else ""
    return ", ".join(items[:MAX_QUOTED]) + more
