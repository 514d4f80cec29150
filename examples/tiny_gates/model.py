"""A small Qwen3 of transformers, and weights to begin with."""

import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

__all__ = ["make_config", "seed_induction"]

FAST_PAIRS = 4  # of the dimensions that RoPE turns, those that tell one position from the next
SHARPER = 2.0  # weights of the norms of queries and keys: logits are 4 times as far apart


def make_config(vocab_size: int, end_of_text: int) -> Qwen3Config:
    """The backbone's configuration: 4 layers of width 256, 2 KV heads of 64, 3.7M parameters."""
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        use_cache=False,
        attn_implementation="sdpa",
    )


def seed_induction(model: Qwen3ForCausalLM) -> None:
    """Let two heads start as an induction circuit: find what followed the last time (Olsson et al., arXiv 2209.11895).

    Recall needs it, and from random weights it comes late: not in 15 minutes on two cores. All weights are trained on
    from here.

    Head 0 of layer 0 attends to the token before and passes on a projection of what it is; head 0 of layer 1 attends to
    where that equals the token at hand, and copies what stands there. For the former, all embeddings share a direction,
    which makes queries and keys that are the same everywhere, and RoPE turns them against each other by one position.
    The latter matches in the dimensions that RoPE turns slowly. Other output projections start at 0, not to drown them.
    """
    config = model.config
    hidden, dim = config.hidden_size, config.head_dim
    half = dim // 2
    basis = nn.init.orthogonal_(torch.empty(hidden, hidden))
    shared, projection, stored, copied = basis[0], basis[1 : 1 + half], basis[half + 1 : 2 * half + 1], basis[-dim:]
    scale = config.initializer_range * hidden**0.5  # norm of an embedding
    written = 3 * config.initializer_range
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    slow = torch.arange(dim) % half >= half // 2
    fast = torch.arange(dim) % half < FAST_PAIRS
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight += scale * shared
        rate = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
        query, key = torch.zeros(dim), torch.zeros(dim)
        query[fast & (torch.arange(dim) < half)] = 1.0
        key[:half], key[half:] = query[:half] * rate.cos(), query[:half] * rate.sin()
        first.q_proj.weight[:dim] = query[:, None] * shared
        first.k_proj.weight[:dim] = key[:, None] * shared
        for norm in (first.q_norm, first.k_norm, second.q_norm, second.k_norm):
            norm.weight *= SHARPER
        first.v_proj.weight[:half] = projection
        first.o_proj.weight[:, :half] = written * stored.T
        second.q_proj.weight[:dim] = 0
        second.k_proj.weight[:dim] = 0
        second.q_proj.weight[:dim][slow] = projection
        second.k_proj.weight[:dim][slow] = stored
        second.v_proj.weight[:dim] = copied
        second.o_proj.weight[:, :dim] = written * copied.T
