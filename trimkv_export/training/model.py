"""A backbone of transformers with gates next to its attention layers.

While gates are trained, attention is weighted by retention: a key at position i counts β_i^(t − i) times for the query
at t, so its logit gets (t − i)·log β_i (TrimKV, arXiv 2512.03324). Elsewhere the model is the plain one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.utils import logging

from trimkv_export.checkpoint.backbone import Backbone
from trimkv_export.errors import CheckpointError
from trimkv_export.words import first_line

__all__ = ["GatedModel", "attending", "attention_input", "load_backbone", "run_gate"]

ATTENTION = "trimkv_retention"
ALIGNED = 8  # columns of queries and keys come in such groups, which fused kernels on GPUs need


def load_backbone(backbone: Backbone, device: torch.device, *, bf16: bool) -> nn.Module:
    """The model of transformers, frozen, in evaluation mode.

    Args:
        backbone: opened and checked.
        device: where it goes.
        bf16: matrices of linear layers are in bfloat16, the rest in float32; else everything is in float32.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            backbone.path,
            dtype=torch.float32,
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise CheckpointError(f"{backbone.path}: transformers cannot load it: {first_line(error)}") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    if bf16:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.to(torch.bfloat16)  # a tied embedding with its head
    return model.to(device).eval().requires_grad_(False)


class GatedModel:
    """A backbone, frozen, and one gate for each layer.

    Attributes:
        backbone: the model.
        decoder: the part of it that makes hidden states of tokens.
        head: the part that makes logits of hidden states.
        gates: in the order of the layers.
    """

    def __init__(self, backbone: nn.Module, gates: nn.ModuleList, *, recompute: bool = False) -> None:
        self.backbone, self.gates = backbone, gates
        self.decoder, self.head = backbone.get_decoder(), backbone.get_output_embeddings()
        self._recompute = recompute
        for layer, gate in zip(self.decoder.layers, gates, strict=True):
            layer.self_attn.__dict__["gate"] = gate  # no child module: the backbone's state stays its own

    def full(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [B, T] -> last hidden states [B, T, d] of the plain model."""
        with torch.no_grad():
            hidden: torch.Tensor = self.decoder(tokens, use_cache=False).last_hidden_state
        return hidden

    def weighted(self, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Tokens [B, T] -> last hidden states [B, T, d] under weighted attention, each layer's log β [B, H, T]."""
        with _weighted_attention(self.decoder, self._recompute):
            hidden = self.decoder(tokens, use_cache=False).last_hidden_state
        return hidden, [layer.self_attn.__dict__.pop("log_beta") for layer in self.decoder.layers]


@contextmanager
def attending(config: Any, name: str) -> Iterator[None]:
    """Within it a model with this config has the attention that is registered with transformers by this name."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def _weighted_attention(decoder: nn.Module, recompute: bool) -> Iterator[None]:
    """Within it the model attends with weights, and each layer leaves its gate's log β."""
    config, layers = decoder.config, decoder.layers
    hooks = [layer.self_attn.register_forward_pre_hook(run_gate, with_kwargs=True) for layer in layers]
    try:
        if recompute:
            for layer in layers:
                layer.forward = partial(_recomputed, config, type(layer).forward, layer)
        with attending(config, ATTENTION):
            yield
    finally:
        for hook, layer in zip(hooks, layers, strict=True):
            hook.remove()
            layer.__dict__.pop("forward", None)


def run_gate(module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> None:
    """A hook before an attention layer with a `gate`: leaves its `log_beta` [B, H, T] for the attention function."""
    x = attention_input(arguments, keywords)
    module.__dict__["log_beta"] = module.__dict__["gate"](x).transpose(1, 2)


def attention_input(arguments: Any, keywords: dict[str, Any]) -> torch.Tensor:
    """The hidden states [B, T, d] among the arguments of an attention layer."""
    x: torch.Tensor = keywords["hidden_states"] if "hidden_states" in keywords else arguments[0]
    return x


def _recomputed(config: Any, forward: Any, layer: nn.Module, *arguments: Any, **keywords: Any) -> Any:
    """A layer whose activations are computed again when gradients need them; the hooks are gone by then."""
    attention = layer.self_attn

    def run(*arguments: Any, **keywords: Any) -> Any:
        hook = None
        if not attention._forward_pre_hooks:
            hook = attention.register_forward_pre_hook(run_gate, with_kwargs=True)
        try:
            with attending(config, ATTENTION):
                return forward(layer, *arguments, **keywords)
        finally:
            if hook is not None:
                hook.remove()

    return checkpoint(run, *arguments, use_reentrant=False, **keywords)


def weighted_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention with logits q·k·scale + (t − i)·log β_i, for query [B, H·G, T, D], key and value [B, H, T, D].

    (t − i)·log β_i is the product of (t, 1) and (log β_i, −i·log β_i): two more columns of query and key, so that
    torch's fused attention does the rest and no [T, T] matrix exists. In float32 whatever autocast says: bfloat16 has
    no positions above 256.
    """
    with torch.autocast(query.device.type, enabled=False):
        log_beta = module.__dict__["log_beta"].float()
        batch, heads, length, dim = query.shape
        scaling = dim**-0.5 if scaling is None else scaling
        position = torch.arange(length, device=query.device, dtype=torch.float32)
        columns = torch.stack([position, torch.ones_like(position)], dim=-1).expand(batch, heads, -1, -1) / scaling
        spare = -(dim + 2) % ALIGNED
        query = functional.pad(torch.cat([query.float(), columns], dim=-1), (0, spare))
        key = torch.cat([key.float(), torch.stack([log_beta, -position * log_beta], dim=-1)], dim=-1)
        key, value = functional.pad(key, (0, spare)), functional.pad(value.float(), (0, 2 + spare))
        group = heads // key.shape[1]
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out[..., :dim].transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, weighted_attention)
