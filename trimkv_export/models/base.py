"""What the graph needs to know of a decoder, the same for every family."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimkv_export.errors import CheckpointError, UnsupportedModelError

__all__ = ["ConfigReader", "DecoderSpec", "DefaultRope", "MRope", "VisionSpec", "VisualTokens"]

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")


@dataclass(frozen=True)
class DefaultRope:
    """Rotary position embedding with inverse frequencies theta^(-2i/D), applied to halves."""

    theta: float
    head_dim: int

    def inverse_frequencies(self) -> NDArray[np.float32]:
        """The D/2 inverse frequencies, computed in float32 as transformers does."""
        exponent = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        return (1.0 / np.float32(self.theta) ** exponent).astype(np.float32)


@dataclass(frozen=True)
class MRope(DefaultRope):
    """Multimodal RoPE, interleaved: a token has a position in time, height and width, and each frequency takes one.

    `mrope_section` counts the frequencies of each axis; the axes take turns (t h w t h w …) until a section is used up,
    and time takes what is left.
    """

    mrope_section: tuple[int, int, int]

    def frequency_axes(self) -> NDArray[np.int64]:
        """The axis of each of the D/2 frequencies: 0 time, 1 height, 2 width."""
        turn, axis = np.divmod(np.arange(self.head_dim // 2, dtype=np.int64), 3)
        return np.where(turn < np.array(self.mrope_section)[axis], axis, 0)


@dataclass(frozen=True)
class VisualTokens:
    """Ids of the tokens that stand for, and enclose, images and video frames."""

    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int


@dataclass(frozen=True)
class DecoderSpec:
    """A pre-norm decoder of attention and gated MLP, in the terms of design.md.

    `prefix` is what the checkpoint puts before `layers.N…`; tensor names follow Hugging Face. `deepstack_layers` K: the
    first K layers' outputs get a visual feature each, added at the visual tokens.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    hidden_act: str
    rope: DefaultRope
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool = False
    qk_norm: bool = False
    prefix: str = "model."
    deepstack_layers: int = 0

    @property
    def takes_visual_inputs(self) -> bool:
        """Whether tokens may be images, with three positions each."""
        return isinstance(self.rope, MRope)

    @property
    def lm_head(self) -> str:
        """Name of the tensor that makes the logits; a tied head is the embedding itself."""
        return f"{self.prefix}embed_tokens.weight" if self.tie_word_embeddings else "lm_head.weight"

    def layer(self, index: int) -> str:
        """Module path of one layer."""
        return f"{self.prefix}layers.{index}"

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor the checkpoint must hold, by name, with its shape."""
        d, depth = self.hidden_size, self.head_dim
        out: dict[str, tuple[int, ...]] = {f"{self.prefix}embed_tokens.weight": (self.vocab_size, d)}
        for index in range(self.num_layers):
            layer, attention = self.layer(index), f"{self.layer(index)}.self_attn"
            out[f"{layer}.input_layernorm.weight"] = (d,)
            for name, rows, columns in (
                ("q_proj", self.num_heads * depth, d),
                ("k_proj", self.num_kv_heads * depth, d),
                ("v_proj", self.num_kv_heads * depth, d),
                ("o_proj", d, self.num_heads * depth),
            ):
                out[f"{attention}.{name}.weight"] = (rows, columns)
                if self.attention_bias:
                    out[f"{attention}.{name}.bias"] = (rows,)
            if self.qk_norm:
                out[f"{attention}.q_norm.weight"] = out[f"{attention}.k_norm.weight"] = (depth,)
            out[f"{layer}.post_attention_layernorm.weight"] = (d,)
            out[f"{layer}.mlp.gate_proj.weight"] = (self.intermediate_size, d)
            out[f"{layer}.mlp.up_proj.weight"] = (self.intermediate_size, d)
            out[f"{layer}.mlp.down_proj.weight"] = (d, self.intermediate_size)
        out[f"{self.prefix}norm.weight"] = (d,)
        out[self.lm_head] = (self.vocab_size, d)
        return out


@dataclass(frozen=True)
class VisionSpec:
    """A vision tower: patches through pre-norm blocks, then groups of them merged into tokens of the decoder.

    Field names follow Hugging Face's `vision_config`. `deepstack_visual_indexes`: the blocks whose output is merged
    too, by a merger each, for the decoder's first layers.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    out_hidden_size: int
    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...]
    hidden_act: str
    layer_norm_eps: float = 1e-6
    prefix: str = "model.visual."

    @property
    def head_dim(self) -> int:
        """D of the tower's attention."""
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Numbers in a patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merged_size(self) -> int:
        """Width of the patches of a token side by side."""
        return self.hidden_size * self.spatial_merge_size**2

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor the checkpoint must hold, by name, with its shape."""
        out: dict[str, tuple[int, ...]] = {}
        h, merged = self.hidden_size, self.merged_size

        def linear(name: str, rows: int, *columns: int) -> None:
            out[f"{self.prefix}{name}.weight"], out[f"{self.prefix}{name}.bias"] = (rows, *columns), (rows,)

        def norm(name: str, size: int) -> None:
            out[f"{self.prefix}{name}.weight"] = out[f"{self.prefix}{name}.bias"] = (size,)

        patch = self.in_channels, self.temporal_patch_size, self.patch_size, self.patch_size
        linear("patch_embed.proj", h, *patch)
        out[f"{self.prefix}pos_embed.weight"] = (self.num_position_embeddings, h)
        for index in range(self.depth):
            block = f"blocks.{index}"
            norm(f"{block}.norm1", h)
            norm(f"{block}.norm2", h)
            linear(f"{block}.attn.qkv", 3 * h, h)
            linear(f"{block}.attn.proj", h, h)
            linear(f"{block}.mlp.linear_fc1", self.intermediate_size, h)
            linear(f"{block}.mlp.linear_fc2", h, self.intermediate_size)
        mergers = {"merger": h}  # norms patches; the DeepStack mergers norm what is merged
        mergers |= {f"deepstack_merger_list.{k}": merged for k in range(len(self.deepstack_visual_indexes))}
        for name, normed in mergers.items():
            norm(f"{name}.norm", normed)
            linear(f"{name}.linear_fc1", merged, merged)
            linear(f"{name}.linear_fc2", self.out_hidden_size, merged)
        return out


class ConfigReader:
    """Typed access to a Hugging Face config.json or an object in it; errors name the file, the key and the value."""

    def __init__(self, config: Mapping[str, Any], where: Path, path: str = "") -> None:
        self.config, self.where = config, where
        self._path = path

    def _bad(self, key: str, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: '{self._path}{key}' must be {wanted}, got {self.config.get(key)!r}")

    def section(self, key: str) -> "ConfigReader":
        """The reader of an object in this one."""
        value = self.config.get(key)
        if not isinstance(value, dict):
            raise self._bad(key, "an object")
        return ConfigReader(value, self.where, f"{self._path}{key}.")

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number above 0."""
        value = self.config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._bad(key, "a whole number above 0")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self.config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self._bad(key, "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.config.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self._bad(key, "true or false")
        return value

    def token_id(self, key: str, default: int, vocab_size: int) -> int:
        """A token of the vocabulary."""
        value = self.config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
            raise self._bad(key, f"a token id from 0 to {vocab_size - 1} (default {default})")
        return value

    def activation(self, default: str | None = None) -> str:
        """`hidden_act`, one of those the graph has."""
        value = self.config.get("hidden_act", default)
        if value not in ACTIVATIONS:
            raise UnsupportedModelError(
                f"{self.where}: {self._path}hidden_act {value!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
            )
        return str(value)

    def _rope_parameters(self) -> "ConfigReader":
        """`rope_parameters` (transformers 5), else `rope_scaling`; an empty object where there is neither."""
        key = "rope_parameters" if self.config.get("rope_parameters") else "rope_scaling"
        return self.section(key) if self.config.get(key) else ConfigReader({}, self.where, self._path)

    def rope(self, head_dim: int, default_theta: float | None) -> DefaultRope:
        """The rotary embedding, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
        parameters = self._rope_parameters()
        kind = parameters.config.get("rope_type", parameters.config.get("type", "default"))
        if kind != "default":
            raise UnsupportedModelError(f"{self.where}: rope_type {kind!r} is not supported yet; supported: default")
        inner = parameters.config.get("rope_theta") is not None
        theta = parameters.number("rope_theta") if inner else self.number("rope_theta", default_theta)
        if head_dim % 2:
            raise UnsupportedModelError(f"{self.where}: rotary embedding needs an even head_dim, got {head_dim}")
        return DefaultRope(theta, head_dim)

    def mrope(self, head_dim: int, default_theta: float | None, default_section: tuple[int, int, int]) -> MRope:
        """Interleaved M-RoPE, from the same two places."""
        plain, parameters = self.rope(head_dim, default_theta), self._rope_parameters()
        if parameters.config.get("mrope_interleaved", True) is not True:
            raise UnsupportedModelError(
                f"{self.where}: mrope_interleaved {parameters.config['mrope_interleaved']!r} is not supported; "
                "supported: true"
            )
        section = parameters.config.get("mrope_section", default_section)
        if (
            not isinstance(section, list | tuple)
            or not all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in section)
            or len(section) != 3
            or sum(section) != head_dim // 2
        ):
            raise CheckpointError(
                f"{self.where}: mrope_section must be three whole numbers that sum to {head_dim // 2}, half the "
                f"head_dim of {head_dim}; got {section!r}"
            )
        return MRope(plain.theta, head_dim, (section[0], section[1], section[2]))
