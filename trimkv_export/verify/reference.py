"""The decoder in plain NumPy, with the cache of `policy/`: what a package's engine is checked against.

Written from the definition of the model, not from the graph; it shares only the package's weights with the engine.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import external_data_helper

from trimkv_export.engine.package import DECODER, Package
from trimkv_export.policy import Eviction, ReferenceCache

__all__ = ["ReferenceDecoder"]

Array = NDArray[np.float32]


class ReferenceDecoder:
    """A decoder and its cache for one sequence, in float32. Weights are read from the package as they are needed."""

    def __init__(self, package: Package) -> None:
        self.model = package.config.model
        self.cache = ReferenceCache(package.config.cache, package.config.eviction)
        graph = onnx.load(str(package.path / DECODER), load_external_data=False).graph
        self._weights = {tensor.name: _Stored(package.path, tensor) for tensor in graph.initializer}
        half = np.arange(0, self.model.head_dim, 2, dtype=np.float32) / np.float32(self.model.head_dim)
        self._frequencies = 1 / np.float32(self.model.rope_theta) ** half

    def _weight(self, name: str) -> Array:
        return self._weights[name].read()

    def _linear(self, x: Array, module: str) -> Array:
        out: Array = x @ self._weight(f"{module}.weight").T
        return out + self._weight(f"{module}.bias") if f"{module}.bias" in self._weights else out

    def _norm(self, x: Array, module: str) -> Array:
        scale = 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(self.model.rms_norm_eps))
        out: Array = x * scale * self._weight(f"{module}.weight")
        return out

    def _activate(self, x: Array) -> Array:
        match self.model.hidden_act:
            case "silu":
                return np.asarray(x / (1 + np.exp(-x)), np.float32)
            case "relu":
                return np.maximum(x, 0)
            case "gelu_pytorch_tanh":
                return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))), np.float32)
        # gelu; the error function to 1.5e-7, Abramowitz and Stegun 7.1.26.
        z = np.abs(x) / np.sqrt(2)
        t = 1 / (1 + 0.3275911 * z)
        series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
        return np.asarray(0.5 * x * (1 + np.sign(x) * (1 - series * np.exp(-z * z))), np.float32)

    def _rotate(self, x: Array, position: NDArray[np.int64]) -> Array:
        angle = position[:, None].astype(np.float32) * self._frequencies
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        left, right = np.split(x, 2, axis=-1)
        return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)

    def _log_beta(self, x: Array, module: str, layer: int) -> Array:
        hidden = self._activate(self._linear(x, f"{module}.linear1"))
        last = f"{module}.linear2"
        if self.model.gate_kind == "rg10":
            hidden = self._activate(self._linear(hidden, f"{module}.linear2"))
            last = f"{module.replace(f'layers.{layer}.', f'layers.{self.model.num_layers - 1}.')}.linear3"
        z = hidden @ self._weight(f"{last}.weight").T + self._weight(f"{module}.bias")
        return np.asarray(np.minimum(z, 0) - np.log1p(np.exp(-np.abs(z))), np.float32)

    def step(self, tokens: Sequence[int], budget: int) -> tuple[Array, Eviction | None]:
        """Feed tokens; returns the logits [V] of the last one, and what an eviction did if there was one."""
        model = self.model
        position = np.arange(len(tokens)) + self.cache.tokens_seen
        hidden = self._weights[f"{model.prefix}embed_tokens.weight"].read_rows(tokens)
        keys, values, log_betas = [], [], []
        for layer in range(model.num_layers):
            path = f"{model.prefix}layers.{layer}"
            module = f"{path}.self_attn"
            x = self._norm(hidden, f"{path}.input_layernorm")
            query, key, value = (
                self._linear(x, f"{module}.{name}_proj").reshape(len(tokens), -1, model.head_dim) for name in "qkv"
            )
            if model.qk_norm:
                query, key = self._norm(query, f"{module}.q_norm"), self._norm(key, f"{module}.k_norm")
            query, key = self._rotate(query, position), self._rotate(key, position)
            attended = self.cache.attend(layer, query, key, value, model.head_dim**-0.5)
            hidden = hidden + self._linear(attended.reshape(len(tokens), -1), f"{module}.o_proj")
            keys.append(key)
            values.append(value)
            log_betas.append(self._log_beta(x, f"{module}.retention_gate", layer))
            x = self._norm(hidden, f"{path}.post_attention_layernorm")
            gate = self._activate(self._linear(x, f"{path}.mlp.gate_proj"))
            hidden = hidden + self._linear(gate * self._linear(x, f"{path}.mlp.up_proj"), f"{path}.mlp.down_proj")
        last = self._norm(hidden[-1:], f"{model.prefix}norm")
        head = f"{model.prefix}embed_tokens" if model.tie_word_embeddings else "lm_head"
        logits = self._linear(last, head)[0]
        return logits, self.cache.update(np.stack(keys), np.stack(values), np.stack(log_betas), budget)


class _Stored:
    """A weight in a file of the package."""

    def __init__(self, folder: Path, tensor: onnx.TensorProto) -> None:
        info = external_data_helper.ExternalDataInfo(tensor)
        self._dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        self._where: dict[str, Any] = {
            "filename": folder / info.location,
            "offset": info.offset or 0,
            "shape": tuple(tensor.dims),
            "dtype": self._dtype if self._dtype.kind == "f" and self._dtype.itemsize != 2 else np.uint16,
        }

    def _map(self) -> NDArray[Any]:
        mapped = np.memmap(mode="r", **self._where)
        return mapped.view(self._dtype)

    def read(self) -> Array:
        return np.asarray(self._map()).astype(np.float32)

    def read_rows(self, rows: Sequence[int]) -> Array:
        return np.asarray(self._map()[list(rows)]).astype(np.float32)
