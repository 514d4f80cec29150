"""Drives PoolAttention and PoolUpdate, as bodies or native, next to the NumPy cache, and compares slot by slot."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

from trimkv_export.backends.native import find_library
from trimkv_export.config import EvictionConfig
from trimkv_export.graph.builder import OPSET
from trimkv_export.graph.functions import pool_attention_function, pool_update_function
from trimkv_export.graph.ops import (
    DOMAIN,
    POOL_ATTENTION,
    POOL_ATTENTION_STATE,
    POOL_UPDATE,
    PoolAttentionAttributes,
    PoolUpdateAttributes,
    pool_update_inputs,
)
from trimkv_export.policy import STATE_TENSORS, CacheSpec, ReferenceCache, slot_streams

__all__ = ["LEVELS", "Harness", "decay"]

Array = NDArray[np.float32]
Level = onnxruntime.GraphOptimizationLevel
LEVELS = {"none": Level.ORT_DISABLE_ALL, "basic": Level.ORT_ENABLE_BASIC, "all": Level.ORT_ENABLE_ALL}
SCALE = 0.3


def decay(rng: np.random.Generator, *shape: int, ties: bool = False) -> Array:
    """log_beta of heads that retain for very different times; with `ties`, whole numbers, many of them 0 or -0."""
    values = -np.exp(rng.standard_normal(shape) * 3 - 3 + 3 * np.arange(shape[-1]))
    return (np.round(values) if ties else values).astype(np.float32)


class Harness:
    """The two operators of L layers in one graph. `state` is bound as past and as present, or else fed and replaced.

    native: take the kernels of the native library, for every harness made from now on.
    """

    native = False

    def __init__(
        self, spec: CacheSpec, config: EvictionConfig, group: int = 1, *, in_place: bool = True, level: str = "all"
    ) -> None:
        self.spec, self.config, self.group = spec, config, group
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.graph_optimization_level = LEVELS[level]
        if self.native:
            options.register_custom_ops_library(str(find_library()))
        model = self._model()
        onnx.checker.check_model(model, full_check=True)
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._outputs = [output.name for output in self._session.get_outputs()]
        self.state = {tensor.name: np.zeros(tensor.shape, tensor.dtype) for tensor in spec.tensors()}
        self.reference = ReferenceCache(spec, config)
        self._binding = self._session.io_binding() if in_place else None

    def _model(self) -> onnx.ModelProto:
        layers, heads, depth = self.spec.num_layers, self.spec.num_kv_heads, self.spec.head_dim
        types = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32}
        info = helper.make_tensor_value_info
        inputs = [info(name, TensorProto.INT32, ["batch"]) for name in ("step_tokens", "budget")]
        outputs, nodes = [], []
        for tensor in self.spec.tensors():
            shape: list[str | int | None] = ["batch", *tensor.shape[1:]]
            inputs.append(info(f"past.{tensor.name}", types[tensor.dtype], shape))
            outputs.append(info(f"present.{tensor.name}", types[tensor.dtype], shape))
        past = [f"past.{name}" for name in POOL_ATTENTION_STATE]
        for layer in range(layers):
            sizes = {"query": [heads * self.group, depth], "key": [heads, depth], "value": [heads, depth]}
            for kind, size in {**sizes, "log_beta": [heads]}.items():
                inputs.append(info(f"{kind}_{layer}", TensorProto.FLOAT, ["batch", "step", *size]))
            outputs.append(info(f"attended_{layer}", TensorProto.FLOAT, ["batch", "step", *sizes["query"]]))
            rows = [f"{kind}_{layer}" for kind in sizes]
            attributes = PoolAttentionAttributes(layer, layers, heads, SCALE).as_dict()
            nodes.append(
                helper.make_node(
                    POOL_ATTENTION, [*rows, *past, "step_tokens"], [f"attended_{layer}"], domain=DOMAIN, **attributes
                )
            )
        # In a decoder the last layer's attention depends on those before it; here their sum stands for that.
        nodes.append(helper.make_node("Sum", [f"attended_{layer}" for layer in range(layers)], ["attended"]))
        update = PoolUpdateAttributes(layers, heads, self.config)
        names = [f"past.{name}" if name in STATE_TENSORS else name for name in pool_update_inputs(layers)]
        present = [f"present.{name}" for name in STATE_TENSORS]
        nodes.append(helper.make_node(POOL_UPDATE, names, present, domain=DOMAIN, **update.as_dict()))
        return helper.make_model(
            helper.make_graph(nodes, "operators", inputs, outputs),
            functions=[pool_attention_function(), pool_update_function(update)],
            ir_version=11,
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        )

    def _run(self, feed: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        if self._binding is None:
            feed |= {f"past.{name}": array.copy() for name, array in self.state.items()}
            found = dict(zip(self._outputs, self._session.run(None, feed), strict=True))
            self.state = {name: found[f"present.{name}"] for name in self.state}
            return found
        for name, array in self.state.items():
            place = "cpu", 0, array.dtype, array.shape, array.ctypes.data
            self._binding.bind_input(f"past.{name}", *place)
            self._binding.bind_output(f"present.{name}", *place)
        for name, array in feed.items():
            self._binding.bind_cpu_input(name, array)
        for layer in range(self.spec.num_layers):
            self._binding.bind_output(f"attended_{layer}")
        self._session.run_with_iobinding(self._binding)
        values = [output.numpy() for output in self._binding.get_outputs()]
        return dict(zip(self._outputs, values, strict=True))

    def step(
        self,
        rng: np.random.Generator,
        tokens: int,
        *,
        padding: int = 0,
        budget: int | None = None,
        log_beta: Any = None,
    ) -> None:
        """One step of random rows through both; raises AssertionError where they differ.

        log_beta: [layers, tokens + padding, heads]; random by default.
        """
        layers, heads, depth = self.spec.num_layers, self.spec.num_kv_heads, self.spec.head_dim
        length = tokens + padding
        if log_beta is None:
            log_beta = decay(rng, layers, length, heads)
        new = {
            "query": rng.standard_normal((layers, 1, length, heads * self.group, depth), np.float32),
            "key": rng.standard_normal((layers, 1, length, heads, depth), np.float32),
            "value": rng.standard_normal((layers, 1, length, heads, depth), np.float32),
            "log_beta": np.asarray(log_beta, np.float32)[:, None],
        }
        used = self.config.budget if budget is None else budget
        feed: dict[str, NDArray[Any]] = {
            "step_tokens": np.array([tokens], np.int32),
            "budget": np.array([used], np.int32),
        }
        feed |= {f"{kind}_{layer}": rows[layer] for kind, rows in new.items() for layer in range(layers)}
        found = self._run(feed)
        valid = {kind: rows[:, 0, :tokens] for kind, rows in new.items()}
        for layer in range(layers):
            expected = self.reference.attend(
                layer, valid["query"][layer], valid["key"][layer], valid["value"][layer], SCALE
            )
            np.testing.assert_allclose(found[f"attended_{layer}"][0, :tokens], expected, atol=5e-6)
        self.reference.update(valid["key"], valid["value"], valid["log_beta"], used)
        self.compare()

    def compare(self) -> None:
        """Every live value of the state is the reference's, bit for bit."""
        expected = self.reference.state
        recent = self.reference.recent_tokens
        live = slot_streams(self.reference.state, self.spec) < self.spec.num_streams
        for name in STATE_TENSORS:
            ours, theirs = self.state[name][0], expected[name]
            if name.startswith("recent"):
                ours, theirs = ours[:, :, :recent], theirs[:, :, :recent]
            elif name.startswith("pool"):
                ours, theirs = ours[live], theirs[live]
            elif name == "slot_index":  # behind the live slots the order means nothing
                ours, theirs = ours[: live.sum()], theirs[: live.sum()]
            np.testing.assert_array_equal(ours, theirs, err_msg=name)

    def reset(self, *, poison: bool) -> None:
        """Start again the way the runtime does it; with `poison`, everything else holds NaN and nonsense."""
        for name, array in self.state.items():
            if name in ("counters", "stream_start"):
                array[...] = 0
            elif poison:
                array[...] = np.nan if array.dtype == np.float32 else -(1 << 30)
        self.reference = ReferenceCache(self.spec, self.config)
