"""What the graph needs to know of a decoder, the same for every family."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trimkv_export.errors import CheckpointError, UnsupportedModelError
from trimkv_export.models.base.limits import MAX_HEAD_DIM
from trimkv_export.models.base.reader import ConfigReader
from trimkv_export.models.base.rope import Rope, read_rope

__all__ = ["DecoderSpec", "read_decoder", "slides"]

MAX_WINDOW_LAYERS = 28  # transformers' default


@dataclass(frozen=True)
class DecoderSpec:
    """A pre-norm decoder of attention and gated MLP, in the terms of docs/design.md; tensor names are Hugging Face's.

    Attributes:
        max_position_embeddings: positions that this decoder is for.
        fused_projections: the query, key and value projections are one matrix, gate and up another.
        prefix: what the checkpoint puts before `layers.N…`.
        takes_visual_inputs: tokens may be images.
        deepstack_layers: K; the first K layers' outputs get a visual feature each, added at the visual tokens.
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
    rope: Rope
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    fused_projections: bool = False
    prefix: str = "model."
    takes_visual_inputs: bool = False
    deepstack_layers: int = 0

    @property
    def attention_projections(self) -> dict[str, int]:
        """The projections into attention, in the order of a fused one, and their rows."""
        kv = self.num_kv_heads * self.head_dim
        return {"q_proj": self.num_heads * self.head_dim, "k_proj": kv, "v_proj": kv}

    @property
    def mlp_projections(self) -> dict[str, int]:
        """The projections into the MLP, in the order of a fused one, and their rows."""
        return {"gate_proj": self.intermediate_size, "up_proj": self.intermediate_size}

    @property
    def lm_head(self) -> str:
        """Name of the tensor that makes the logits; a tied head is the embedding itself."""
        return f"{self.prefix}embed_tokens.weight" if self.tie_word_embeddings else "lm_head.weight"

    def layer(self, index: int) -> str:
        """Module path of one layer."""
        return f"{self.prefix}layers.{index}"

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor the checkpoint must hold, by name, with its shape."""
        d = self.hidden_size
        out: dict[str, tuple[int, ...]] = {f"{self.prefix}embed_tokens.weight": (self.vocab_size, d)}

        def linear(name: str, rows: int, columns: int, *, bias: bool) -> None:
            out[f"{name}.weight"] = (rows, columns)
            if bias:
                out[f"{name}.bias"] = (rows,)

        for index in range(self.num_layers):
            layer = self.layer(index)
            attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
            for module, fused, parts, bias in (
                (attention, "qkv_proj", self.attention_projections, self.qkv_bias),
                (mlp, "gate_up_proj", self.mlp_projections, self.mlp_bias),
            ):
                for name, rows in ({fused: sum(parts.values())} if self.fused_projections else parts).items():
                    linear(f"{module}.{name}", rows, d, bias=bias)
            linear(f"{attention}.o_proj", d, self.num_heads * self.head_dim, bias=self.output_bias)
            linear(f"{mlp}.down_proj", d, self.intermediate_size, bias=self.mlp_bias)
            if self.qk_norm:
                out[f"{attention}.q_norm.weight"] = out[f"{attention}.k_norm.weight"] = (self.head_dim,)
            out[f"{layer}.input_layernorm.weight"] = out[f"{layer}.post_attention_layernorm.weight"] = (d,)
        out[f"{self.prefix}norm.weight"] = (d,)
        out[self.lm_head] = (self.vocab_size, d)
        return out


def _whole_heads(read: ConfigReader, head_dim: int) -> Rope:
    return read_rope(read, head_dim, whole=True)


def read_decoder(
    read: ConfigReader,
    model_type: str,
    *,
    max_position: int,
    head_dim: int | None = None,
    rms_norm_eps: float = 1e-6,
    rope: Callable[[ConfigReader, int], Rope] = _whole_heads,
    windowed: bool = False,
    **differences: Any,
) -> DecoderSpec:
    """The decoder of a config, in the keys that all families share. Raises as a family does.

    Args:
        read: the decoder's config.
        model_type: the family's name.
        max_position: the family's default for max_position_embeddings.
        head_dim: the family's default; without one it is hidden_size over the heads.
        rms_norm_eps: the family's default.
        rope: reads the rotary embedding for a head_dim.
        windowed: each token sees `sliding_window` tokens, itself included. The pool holds what retention keeps, not the
            newest, so a window must be no shorter than the context.
        **differences: fields that the family sets itself.
    """
    heads, hidden = read.integer("num_attention_heads"), read.integer("hidden_size")
    kv_heads = read.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"{read.where}: num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads})"
        )
    if head_dim is None and read.get("head_dim") is None and hidden % heads:
        raise CheckpointError(
            f"{read.where}: hidden_size ({hidden}) must be a multiple of num_attention_heads ({heads}) where there is "
            "no head_dim"
        )
    depth = read.integer("head_dim", head_dim or max(hidden // heads, 1))
    if depth > MAX_HEAD_DIM:  # as the config has none
        raise UnsupportedModelError(
            f"{read.where}: hidden_size ({hidden}) over num_attention_heads ({heads}) is a head_dim of {depth}, and "
            f"the kernels take at most {MAX_HEAD_DIM}"
        )
    windowed = _slides(read) or windowed
    if not read.flag("is_causal", True):
        raise read.unsupported("is_causal", "true")
    turned, positions = rope(read, depth), read.integer("max_position_embeddings", max_position)
    context, window = read.context or positions, read.integer("sliding_window", 4096) if windowed else None
    if window is not None and context > window:
        raise UnsupportedModelError(
            f"{read.where}: the model sees {window} tokens back (sliding_window), and the context is {context}, where "
            f"the pool would see more; build for a context of at most {window} with --context"
        )
    fields: dict[str, Any] = {
        "model_type": model_type,
        "num_layers": read.integer("num_hidden_layers"),
        "hidden_size": hidden,
        "intermediate_size": read.integer("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": depth,
        "vocab_size": read.integer("vocab_size"),
        "rms_norm_eps": read.number("rms_norm_eps", rms_norm_eps),
        "hidden_act": read.activation(),
        "rope": turned,
        "max_position_embeddings": min(filter(None, (positions, turned.max_position, window))),
        "tie_word_embeddings": read.flag("tie_word_embeddings"),
    }
    return DecoderSpec(**fields | differences)


def slides(read: ConfigReader) -> bool:
    """Whether a Qwen model has layers that see a window only: those that `layer_types` says, or where it is absent,
    those from `max_window_layers` on if `use_sliding_window`.
    """
    used, first = read.flag("use_sliding_window"), read.get("max_window_layers", MAX_WINDOW_LAYERS)
    if type(first) is not int:
        raise read.bad("max_window_layers", "a whole number")
    return used and read.get("layer_types") is None and first < read.integer("num_hidden_layers")


def _slides(read: ConfigReader) -> bool:
    """Whether `layer_types` names a layer that sees a window only."""
    types = read.get("layer_types")
    if types is None:
        return False
    if not isinstance(types, list | tuple) or not set(map(str, types)) <= {"full_attention", "sliding_attention"}:
        raise read.unsupported("layer_types", "a list of full_attention and sliding_attention")
    return "sliding_attention" in types
