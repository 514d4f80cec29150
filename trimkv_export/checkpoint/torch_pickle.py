"""Read the pickle inside a torch.save file without running it.

A pickle is a program for a small stack machine, and `pickle.load` lets it call what it names. This module steps through
the opcodes with `pickletools` and interprets only those that describe tensors. No global is ever imported and nothing
is ever called, so there is nothing a hostile file could reach.
"""

import pickletools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimkv_export.errors import CheckpointError
from trimkv_export.words import shorten

__all__ = ["PickledTensor", "Storage", "read_tensor_pickle"]

STORAGE_DTYPES: Mapping[str, str] = {
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.DoubleStorage": "float64",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
}
CALLABLES = ("collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter")
ACCEPTED_GLOBALS = frozenset((*STORAGE_DTYPES, *CALLABLES))

PUSH_ARGUMENT = {"BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT"}
PUSH_ARGUMENT |= {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
CONSTANTS: Mapping[str, object] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
FIXED_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class Storage:
    """The bytes behind one or more tensors: entry `data/{key}` of the zip, `numel` elements of `dtype`."""

    dtype: str
    key: str
    numel: int


@dataclass(frozen=True)
class PickledTensor:
    """A tensor as the pickle describes it; `offset` and `stride` count elements of the storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Global:
    name: str


def read_tensor_pickle(data: bytes, file: Path) -> dict[str, PickledTensor]:
    """The tensors of `data`, the `data.pkl` of the torch.save file `file` (used in messages).

    Raises:
        CheckpointError: the pickle names a global or uses an opcode that no plain dict of tensors needs, is malformed,
            or is something other than a dict from text to tensors.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # odd escapes in text opcodes
            value = _Machine(file).run(data)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(
            f"{file}: its data.pkl is not a valid pickle ({type(error).__name__}): the file is corrupt; fetch it again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: holds a {_kind(value)}, not a dict from names to tensors: save a state_dict")
    for name, tensor in value.items():
        if not isinstance(tensor, PickledTensor):
            raise CheckpointError(
                f"{file}: {shorten(name)} is a {_kind(tensor)}, and only tensors are accepted: save the state_dict "
                "itself"
            )
    return value


class _Machine:
    """The stack machine: `run` returns what the pickle builds, made of dict, list, tuple, scalars and tensors."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> object:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                break
            self.step(opcode.name, argument)
        return self.stack.pop()

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in PUSH_ARGUMENT:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in FIXED_TUPLES:
            stack.append(tuple(self.pop(FIXED_TUPLES[name])))
        else:
            match name:
                case "PROTO" | "FRAME":
                    pass
                case "MARK":
                    self.marks.append(len(stack))
                case "TUPLE":
                    stack.append(tuple(self.pop_to_mark()))
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_LIST":
                    stack.append([])
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    self.memo[argument] = stack[-1]
                case "MEMOIZE":
                    self.memo[len(self.memo)] = stack[-1]
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(self.memo[argument])
                case "APPEND":
                    self.extend(self.pop(1))
                case "APPENDS":
                    self.extend(self.pop_to_mark())
                case "SETITEM":
                    self.set_items(self.pop(2))
                case "SETITEMS":
                    self.set_items(self.pop_to_mark())
                case "GLOBAL" | "INST":
                    stack.append(self.accept(*argument.split(" ", 1)))
                case "STACK_GLOBAL":
                    stack.append(self.accept(*self.pop(2)))
                case "REDUCE":
                    stack.append(self.rebuild(*self.pop(2)))
                case "BINPERSID":
                    stack.append(self.storage(*self.pop(1)))
                case "BUILD":  # attributes, such as the _metadata of a state_dict: not needed
                    self.pop(1)
                case _:
                    raise CheckpointError(
                        f"{self.file}: its pickle uses the opcode {name}; pickles can run code, and only plain tensors "
                        "are accepted"
                    )

    def pop(self, count: int) -> list[Any]:
        start = len(self.stack) - count
        if start < (self.marks[-1] if self.marks else 0):
            raise IndexError("stack underflow")
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def pop_to_mark(self) -> list[Any]:
        values = self.pop(len(self.stack) - self.marks[-1])
        self.marks.pop()
        return values

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise TypeError("not a list")
        target.extend(values)

    def set_items(self, values: list[Any]) -> None:
        target, names = self.stack[-1], values[::2]
        if not isinstance(target, dict) or len(values) % 2:
            raise TypeError("not a dict")
        for name in names:
            if not isinstance(name, str):
                raise CheckpointError(f"{self.file}: a key is a {_kind(name)}, and only names of tensors are accepted")
        target.update(zip(names, values[1::2], strict=True))

    def accept(self, module: object, name: object) -> _Global:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("not a global")
        found = f"{module}.{name}"
        if found not in ACCEPTED_GLOBALS:
            raise CheckpointError(
                f"{self.file}: its pickle names {shorten(found)}; pickles can run code, and only tensors are accepted: "
                "save a plain state_dict of float tensors, or use a .safetensors file"
            )
        return _Global(found)

    def storage(self, record: Any) -> Storage:
        kind, storage_type, key, _, numel = record
        dtype = STORAGE_DTYPES[storage_type.name] if isinstance(storage_type, _Global) else None
        if kind != "storage" or dtype is None or not isinstance(key, str) or not _is_sizes((numel,)):
            raise ValueError("not a storage")
        return Storage(dtype, key, numel)

    def rebuild(self, function: Any, arguments: Any) -> object:
        """Do what the three accepted callables would do."""
        name = function.name if isinstance(function, _Global) else ""
        if name == "collections.OrderedDict" and arguments == ():
            return {}
        if name == "torch._utils._rebuild_parameter" and isinstance(arguments[0], PickledTensor):
            return arguments[0]
        if name != "torch._utils._rebuild_tensor_v2":
            raise ValueError("not a tensor")
        storage, offset, shape, stride = arguments[:4]
        if (
            not isinstance(storage, Storage)
            or not _is_sizes((offset,))
            or not (_is_sizes(shape) and _is_sizes(stride) and len(shape) == len(stride))
        ):
            raise ValueError("not a tensor")
        return PickledTensor(storage, offset, shape, stride)


def _is_sizes(value: object) -> bool:
    return isinstance(value, tuple) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _kind(value: object) -> str:
    return "tensor" if isinstance(value, PickledTensor) else type(value).__name__
