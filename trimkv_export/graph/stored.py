"""Where a graph's weights lie on disk."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import external_data_helper

__all__ = ["StoredTensor", "stored_tensors"]


def stored_tensors(folder: Path, graph: str) -> dict[str, "StoredTensor"]:
    """The weights of a graph of a package, by name; none is read yet."""
    initializers = onnx.load(str(folder / graph), load_external_data=False).graph.initializer
    return {tensor.name: StoredTensor(folder, tensor) for tensor in initializers}


class StoredTensor:
    """A weight in a file of the package; one of int4 as the bytes of its rows.

    Attributes:
        bits: of an element.
    """

    def __init__(self, folder: Path, tensor: onnx.TensorProto) -> None:
        info = external_data_helper.ExternalDataInfo(tensor)
        packed = tensor.data_type == onnx.TensorProto.INT4
        self.bits = 4 if packed else onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * 8
        self._dtype = np.dtype(np.uint8) if packed else onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        self._where: dict[str, Any] = {
            "filename": folder / info.location,
            "offset": info.offset or 0,
            "shape": (tensor.dims[0], tensor.dims[1] // 2) if packed else tuple(tensor.dims),
            "dtype": np.uint16 if self._dtype.itemsize == 2 else self._dtype,
        }

    def read(self, rows: list[int] | None) -> NDArray[Any]:
        """All, or some rows, a copy."""
        mapped = np.memmap(mode="r", **self._where).view(self._dtype)
        return np.array(mapped if rows is None else mapped[rows])
