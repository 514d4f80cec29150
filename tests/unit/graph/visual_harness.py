"""A random Qwen3-VL decoder twice: in transformers, and as our graph in ONNX Runtime."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from transformers import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

from trimkv_export.backends.native import find_library
from trimkv_export.config import EvictionConfig, Policy, Precision
from trimkv_export.graph import GateSpec, ModelGraph, build_decoder, cache_spec
from trimkv_export.models import DecoderSpec, decoder_spec

__all__ = ["Prompt", "VisualDecoder", "visual_graph", "visual_spec"]

Array = NDArray[Any]
# Above every context of these tests, so nothing is evicted and the reference is plain attention.
EVICTION = EvictionConfig(Policy.GLOBAL, 64, 4)
INNER = 6
PREFIX = "model.language_model."


def visual_config(
    *,
    tied: bool = False,
    heads: int = 4,
    kv_heads: int = 2,
    section: Sequence[int] = (3, 1, 2),
    deepstack: int = 2,
    layers: int = 3,
    bias: bool = False,
) -> dict[str, Any]:
    """A config.json with the decoder of a test."""
    text = {
        "num_hidden_layers": layers, "hidden_size": 20, "intermediate_size": 36, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": 2 * sum(section), "vocab_size": 40, "hidden_act": "silu",
        "attention_bias": bias, "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "default", "mrope_section": list(section), "mrope_interleaved": True},
    }  # fmt: skip
    vision = {"depth": 8, "deepstack_visual_indexes": list(range(deepstack)), "out_hidden_size": 20}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    tokens = {name: 30 + number for number, name in enumerate(names)}
    sections = {"text_config": text, "vision_config": vision}
    return {"model_type": "qwen3_vl", "tie_word_embeddings": tied, **tokens, **sections}


def visual_spec(**changes: Any) -> DecoderSpec:
    """The decoder of `visual_config`."""
    return decoder_spec(visual_config(**changes), Path("config.json"))


def visual_graph(kind: str = "rg10", precision: Precision = Precision.FP32, **changes: Any) -> ModelGraph:
    """Its graph, without weights."""
    return build_decoder(visual_spec(**changes), GateSpec(kind, INNER), EVICTION, precision)


@dataclass
class Prompt:
    """Tokens of one sequence with three positions each; some are visual and carry features."""

    tokens: Array  # [n]
    position: Array  # [3, n]
    visual: Array  # [n] bool
    embeds: Array  # [v, d]
    deepstack: Array  # [K, v, d]

    def part(self, start: int, end: int) -> "Prompt":
        """The tokens start:end with their features."""
        first, last = int(self.visual[:start].sum()), int(self.visual[:end].sum())
        return Prompt(
            self.tokens[start:end],
            self.position[:, start:end],
            self.visual[start:end],
            self.embeds[first:last],
            self.deepstack[:, first:last],
        )


class VisualDecoder:
    """Weights, the model of transformers, and our graph with a state of `rows` rows.

    rows > 1 needs the native library.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        kind: str = "rg10",
        precision: Precision = Precision.FP32,
        rows: int = 1,
        native: bool = False,
        spec: DecoderSpec | None = None,
        **changes: Any,
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.config = visual_config(**changes)
        self.spec = spec or visual_spec(**changes)
        graph = build_decoder(self.spec, GateSpec(kind, INNER), EVICTION, precision)
        self.weights = {weight.name: self._random(weight.name, weight.shape) for weight in graph.weights}
        for tensor in graph.model.graph.initializer:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            tensor.CopyFrom(onnx.numpy_helper.from_array(self.weights[tensor.name].astype(dtype), tensor.name))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        if native:
            options.register_custom_ops_library(str(find_library()))
        self.session = onnxruntime.InferenceSession(
            graph.model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.float_type = precision.dtype
        self.state: dict[str, Array] = {
            f"past.{tensor.name}": np.zeros((rows, *tensor.shape[1:]), tensor.dtype)
            for tensor in cache_spec(self.spec, EVICTION, precision).tensors()
        }

    def _random(self, name: str, shape: tuple[int, ...]) -> Array:
        """Of a size that keeps every layer's output around 1, so that a wrong one shows in the logits."""
        values = self.rng.standard_normal(shape)
        if "norm" in name:
            return np.asarray(1 + 0.2 * values, np.float32)
        return np.asarray(values / (shape[-1] ** 0.5 if len(shape) > 1 else 4), np.float32)

    def prompt(self, count: int, visual: Sequence[int] | None = None) -> Prompt:
        """`count` random tokens at random positions; those at `visual` carry features (default: a random half)."""
        mask = self.rng.random(count) < 0.5
        if visual is not None:
            mask = np.isin(np.arange(count), visual)
        width, features = self.spec.hidden_size, int(mask.sum())
        return Prompt(
            self.rng.integers(0, self.spec.vocab_size, count),
            self.rng.integers(0, 60, (3, count)),
            mask,
            self.rng.standard_normal((features, width)).astype(np.float32),
            self.rng.standard_normal((self.spec.deepstack_layers, features, width)).astype(np.float32),
        )

    def feed(self, parts: Sequence[Prompt]) -> dict[str, Array]:
        """The inputs of a step, one part a row, padded on the right."""
        steps = max(len(part.tokens) for part in parts)
        ids, position = np.zeros((len(parts), steps), np.int64), np.zeros((3, len(parts), steps), np.int64)
        for row, part in enumerate(parts):
            ids[row, : len(part.tokens)] = part.tokens
            position[:, row, : len(part.tokens)] = part.position
        feed: dict[str, Array] = {
            "input_ids": ids,
            "position_ids": position,
            "step_tokens": np.array([len(part.tokens) for part in parts], np.int32),
            "budget": np.full(len(parts), EVICTION.budget, np.int32),
            "visual_index": np.concatenate(
                [row * steps + np.flatnonzero(part.visual) for row, part in enumerate(parts)]
            ),
            "visual_embeds": np.concatenate([part.embeds for part in parts]).astype(self.float_type),
        }
        if self.spec.deepstack_layers:
            features = np.concatenate([part.deepstack for part in parts], axis=1)
            feed["deepstack_embeds"] = features.astype(self.float_type)
        return feed

    def step(self, *parts: Prompt) -> Array:
        """Logits [rows, V] behind each row's part."""
        logits, *state = self.session.run(None, self.feed(parts) | self.state)
        self.state = dict(zip(self.state, state, strict=True))
        return np.asarray(logits)

    def reset(self) -> None:
        """Forget the tokens of every row."""
        for name in ("past.counters", "past.stream_start"):
            self.state[name] = np.zeros_like(self.state[name])

    def reference(self, prompt: Prompt) -> Array:
        """Logits [n, V] of transformers, which sees the prompt at once."""
        config = Qwen3VLTextConfig(**copy.deepcopy(self.config["text_config"]), attn_implementation="eager")
        model = Qwen3VLTextModel(config).eval()
        own = {name: torch.from_numpy(self.weights[PREFIX + name]) for name in model.state_dict()}
        model.load_state_dict(own)
        with torch.no_grad():
            embeds = model.embed_tokens(torch.from_numpy(prompt.tokens))
            visual = torch.from_numpy(prompt.visual)
            embeds[visual] = torch.from_numpy(prompt.embeds)
            out = model(
                inputs_embeds=embeds[None],
                position_ids=torch.from_numpy(prompt.position)[:, None],
                visual_pos_masks=visual[None],
                deepstack_visual_embeds=list(torch.from_numpy(prompt.deepstack)),
                use_cache=False,
            )
        logits = out.last_hidden_state[0] @ torch.from_numpy(self.weights[self.spec.lm_head]).T
        return np.asarray(logits.numpy())
