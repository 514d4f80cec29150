"""The decoder in plain NumPy, with the cache of `policy/`: what a package's engine is checked against.

Written from the definition of the model, not from the graph; it shares only the package's weights with the engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trimkv_export.package import DECODER, Package
from trimkv_export.policy import Eviction, ReferenceCache
from trimkv_export.verify.stored_weights import Array, StoredWeights, activate

__all__ = ["ReferenceDecoder", "VisualTokens"]


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """The visual tokens of a step.

    Attributes:
        place: [V], which tokens of the step they are.
        embeds: [V, d], what they have in place of a token's embedding.
        deepstack: [K, V, d], what is added to the outputs of the first K layers there.
    """

    place: NDArray[np.int64]
    embeds: Array
    deepstack: Array


class ReferenceDecoder:
    """A decoder and its cache for one sequence, in float32. Weights are read from the package as they are needed."""

    def __init__(self, package: Package) -> None:
        self.model = package.config.model
        self.cache = ReferenceCache(package.config.cache, package.config.eviction)
        found = package.config.quantization
        self._weights = StoredWeights(package.path, DECODER, found)
        own_head = not self.model.tie_word_embeddings or (found is not None and found.qdq and found.head)
        self._head = "lm_head" if own_head else f"{self.model.prefix}embed_tokens"
        self._frequencies = np.array(self.model.rope.inverse_frequencies, np.float32)
        self._axes = list(self.model.rope.axes or [0] * len(self._frequencies))

    def _norm(self, x: Array, module: str) -> Array:
        scale = 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(self.model.rms_norm_eps))
        out: Array = x * scale * self._weights.read(f"{module}.weight")
        return out

    def _projections(self, x: Array, module: str, names: Sequence[str], fused: str, ends: Sequence[int]) -> list[Array]:
        """Projections of one input; of a fused one, up to and between the columns `ends`, and the rest."""
        linear = self._weights.linear
        if not self.model.fused_projections:
            return [linear(x, f"{module}.{name}") for name in names]
        return np.split(linear(x, f"{module}.{fused}"), ends, axis=-1)

    def _activate(self, x: Array) -> Array:
        return activate(x, self.model.hidden_act)

    def _angles(self, positions: NDArray[np.int64]) -> Array:
        """Rotary angles [S, R] of tokens at positions [3, S]: each frequency counts along one axis."""
        return np.asarray(positions[self._axes].T.astype(np.float32) * self._frequencies, np.float32)

    def _log_beta(self, x: Array, module: str, layer: int) -> Array:
        hidden = self._activate(self._weights.linear(x, f"{module}.linear1"))
        last = f"{module}.linear2"
        if self.model.gate_kind == "rg10":
            hidden = self._activate(self._weights.linear(hidden, f"{module}.linear2"))
            last = f"{module.replace(f'layers.{layer}.', f'layers.{self.model.num_layers - 1}.')}.linear3"
        z = hidden @ self._weights.read(f"{last}.weight").T + self._weights.read(f"{module}.bias")
        return np.asarray(np.minimum(z, 0) - np.log1p(np.exp(-np.abs(z))), np.float32)

    def step(
        self,
        tokens: Sequence[int],
        budget: int,
        positions: NDArray[np.int64] | None = None,
        visual: VisualTokens | None = None,
    ) -> tuple[Array, Eviction | None]:
        """Feed tokens.

        Args:
            tokens: S of them.
            budget: entries kept per layer and KV head, on average.
            positions: [3, S], in time, height and width; None counts on from the tokens seen, as text alone does.
            visual: the visual tokens among them; None if there are none.

        Returns:
            The logits [V] of the last token, and what an eviction did; None if there was none.
        """
        model, linear = self.model, self._weights.linear
        if positions is None:
            positions = np.tile(np.arange(len(tokens)) + self.cache.tokens_seen, (3, 1))
        angles = self._angles(positions)
        hidden = self._weights.read_rows(f"{model.prefix}embed_tokens.weight", tokens)
        if visual is not None:
            hidden[visual.place] = visual.embeds
        keys, values, log_betas = [], [], []
        heads = [model.num_heads * model.head_dim, (model.num_heads + model.num_kv_heads) * model.head_dim]
        for layer in range(model.num_layers):
            path = f"{model.prefix}layers.{layer}"
            module = f"{path}.self_attn"
            x = self._norm(hidden, f"{path}.input_layernorm")
            query, key, value = (
                part.reshape(len(tokens), -1, model.head_dim)
                for part in self._projections(x, module, ("q_proj", "k_proj", "v_proj"), "qkv_proj", heads)
            )
            if model.qk_norm:
                query, key = self._norm(query, f"{module}.q_norm"), self._norm(key, f"{module}.k_norm")
            query, key = (_rotate(part, angles, model.rope.attention_scaling) for part in (query, key))
            attended = self.cache.attend(layer, query, key, value, model.head_dim**-0.5)
            hidden = hidden + linear(attended.reshape(len(tokens), -1), f"{module}.o_proj")
            keys.append(key)
            values.append(value)
            log_betas.append(self._log_beta(x, f"{module}.retention_gate", layer))
            x = self._norm(hidden, f"{path}.post_attention_layernorm")
            names, inner = ("gate_proj", "up_proj"), [model.intermediate_size]
            gate, up = self._projections(x, f"{path}.mlp", names, "gate_up_proj", inner)
            hidden = hidden + linear(self._activate(gate) * up, f"{path}.mlp.down_proj")
            if visual is not None and layer < model.deepstack_layers:
                hidden[visual.place] += visual.deepstack[layer]
        last = self._norm(hidden[-1:], f"{model.prefix}norm")
        logits = linear(last, self._head)[0]
        return logits, self.cache.update(np.stack(keys), np.stack(values), np.stack(log_betas), budget)


def _rotate(x: Array, angles: Array, scaling: float) -> Array:
    """Turn the pairs (i, i + R) of x [S, heads, D] by angles [S, R], and scale them; what is beyond 2R stays."""
    count = angles.shape[1]
    cos, sin = (np.float32(scaling) * table(angles)[:, None] for table in (np.cos, np.sin))
    left, right, rest = np.split(x, [count, 2 * count], axis=-1)
    return np.concatenate([left * cos - right * sin, right * cos + left * sin, rest], axis=-1)
