"""A cheap start: gates learn how long tokens are attended to, from forward passes of the plain model alone.

A token of age τ that is kept with β^τ costs λ·β^τ of the cache, and without it the attention a(τ) that it would get is
lost. To lose a share τ·(−log β) of a(τ), the first-order loss of a logit that is lowered by τ·(−log β), the best
x = −log β has least

    x·Σ τ·a(τ) + λ·Σ e^(−xτ)

which is what is minimised here, for all tokens of all streams. It is convex in x; for long texts its minimum is
x = sqrt(λ / Σ τ·a(τ)). The price λ is moved until as much is retained as the budget says: one price for all streams
(rg10) or one for each (rg).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface

from trimkv_export.training.model import GatedModel, attending, attention_input
from trimkv_export.training.options import TrainingOptions
from trimkv_export.training.rows import Rows

__all__ = ["FIRST_ROW", "start_gates"]

ATTENTION = "trimkv_measured"
FIRST_ROW = 1 << 40  # rows of the start have numbers from here, others than those of the steps
QUERIES = 128  # of which attention is in memory at a time
UPDATES = 6  # for each row
TOKENS = 1024  # of an update
REMEMBERED = 1 << 30  # bytes of rows that updates draw from
RATE, BIAS_RATE = 1e-3, 1e-2  # biases have further to go: streams retain for 10 or for 10,000 tokens
SHORTEST = 0.25  # of a row has to follow a token that is learned from
PRICE_RATE = 0.3
LEAST = 1e-6  # of attention


def start_gates(
    model: GatedModel, rows: Rows, options: TrainingOptions, *, bf16: bool, progress: Any = lambda _done: None
) -> None:
    """Train the gates of `model`, on `options.start_rows` rows.

    Args:
        model: with new gates.
        rows: rows `FIRST_ROW` and on are read.
        options: of the run.
        bf16: the model has matrix products in bfloat16; gates have theirs in float32.
        progress: called with the rows done.
    """
    gates = model.gates
    biases = [gate.bias for gate in gates]
    others = [value for name, value in gates.named_parameters() if not name.endswith(".bias") or "linear" in name]
    groups = [{"params": biases, "peak": BIAS_RATE}, {"params": others, "peak": RATE}]
    optimiser = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)
    draw = np.random.default_rng([options.seed, FIRST_ROW])
    memory: list[tuple[torch.Tensor, torch.Tensor]] = []
    price: torch.Tensor | None = None
    for number in range(options.start_rows):
        tokens = torch.from_numpy(rows.row(FIRST_ROW + number).tokens).to(gates[0].bias.device)
        inputs, used = _measure(model, tokens, bf16=bf16)
        memory.append((inputs, used))
        while len(memory) > 1 and sum(x.nbytes + a.nbytes for x, a in memory) > REMEMBERED:
            memory.pop(0)
        if price is None:
            price = _first_price(used, options)
            _set_biases(gates, used, price)
        for update in range(UPDATES):
            done = (number * UPDATES + update) / (options.start_rows * UPDATES)
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * min(1.0, 2 - 2 * done)
            optimiser.zero_grad()
            for part in _parts(memory, draw):
                _loss(gates, *part, price).backward()
            nn.utils.clip_grad_norm_(gates.parameters(), 1.0)
            optimiser.step()
        price = price * (_retained(gates, inputs, options) / options.budget) ** PRICE_RATE
        progress(number + 1)


def _set_biases(gates: nn.ModuleList, used: torch.Tensor, price: torch.Tensor) -> None:
    """Let each stream begin where its tokens are on average, by the closed form."""
    decay = (price[:, None] / used.clamp(min=LEAST)).sqrt().log().mean(1).exp()  # [L, H]
    with torch.no_grad():
        for gate, x in zip(gates, decay, strict=True):
            gate.bias.copy_(-torch.log(torch.expm1(x.clamp(1e-4, 5.0))))


def _measure(model: GatedModel, tokens: torch.Tensor, *, bf16: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What the gates read [L, T, d] in bfloat16, and Σ τ·a(τ) of each token [L, T, H]."""
    # Not around the updates: autocast keeps its copies of weights, and would go on with those of the first update.
    autocast = torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16)
    with torch.no_grad(), _measured_attention(model.decoder), autocast:
        model.decoder(tokens[None], use_cache=False)
    found = [layer.self_attn.__dict__.pop("measured") for layer in model.decoder.layers]
    inputs, used = (torch.stack(part) for part in zip(*found, strict=True))
    return inputs, used


@contextmanager
def _measured_attention(decoder: nn.Module) -> Iterator[None]:
    def keep_input(module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> None:
        module.__dict__["measured"] = attention_input(arguments, keywords)[0].to(torch.bfloat16)

    hooks = [layer.self_attn.register_forward_pre_hook(keep_input, with_kwargs=True) for layer in decoder.layers]
    try:
        with attending(decoder.config, ATTENTION):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def measured_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of one row, which also leaves what each token is used for."""
    _batch, heads, length, dim = query.shape
    kv_heads = key.shape[1]
    scaling = dim**-0.5 if scaling is None else scaling
    key, value = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
    used = torch.zeros(heads, length, device=query.device)
    position = torch.arange(length, device=query.device)
    parts = []
    for begin in range(0, length, QUERIES):
        end = min(begin + QUERIES, length)
        age = position[begin:end, None] - position[None, :end]
        scores = (query[0, :, begin:end] @ key[0, :, :end].transpose(1, 2)).float() * scaling
        shares = scores.masked_fill_(age < 0, float("-inf")).softmax(-1)
        parts.append(shares.to(value.dtype) @ value[0, :, :end])
        used[:, :end] += (shares * age.clamp(min=0)).sum(1)
    module.__dict__["measured"] = (module.__dict__["measured"], used.view(kv_heads, -1, length).sum(1).T)
    return torch.cat(parts, dim=1).transpose(0, 1)[None].contiguous(), None


AttentionInterface.register(ATTENTION, measured_attention)


def _parts(
    memory: list[tuple[torch.Tensor, torch.Tensor]], draw: np.random.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Inputs [L, n, d], uses [L, n, H] and what follows [n] of tokens of one or several rows, TOKENS in all."""
    some = draw.permutation(len(memory))[:4]
    for index in some:
        inputs, used = memory[index]
        length = inputs.shape[1]
        allowed = length - max(1, int(SHORTEST * length))
        places = torch.from_numpy(draw.choice(allowed, min(allowed, TOKENS // len(some)), replace=False))
        places = places.to(inputs.device)
        yield inputs[:, places], used[:, places], (length - 1 - places).float()


def _loss(
    gates: nn.ModuleList, inputs: torch.Tensor, used: torch.Tensor, follows: torch.Tensor, price: torch.Tensor
) -> torch.Tensor:
    """The mean of x·Σ τ·a(τ) / λ + Σ e^(−xτ) over tokens and streams."""
    total = torch.zeros((), device=inputs.device)
    rest = follows[:, None]
    for gate, x, use, cost in zip(gates, inputs, used, price.expand(len(gates), -1), strict=True):
        decay = -gate(x.float())  # [n, H]
        # Beyond rest², the minimum is at 0 whatever the use.
        total = total + (decay * torch.minimum(use / cost, rest.square())).mean() + _sum(decay, rest).mean()
    return total / len(gates)


def _sum(decay: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """Σ e^(−xτ) for τ from 1 to `rest`, also where x is near 0."""
    decay = decay.clamp(min=1e-7)
    return torch.expm1(-decay * rest) / torch.expm1(-decay) * torch.exp(-decay)


def _mass(decay: torch.Tensor) -> torch.Tensor:
    """What streams retain, on average over the second half of a row: x [..., T, H] -> [..., H]."""
    length = decay.shape[-2]
    queries = torch.arange(length // 2, length, max(1, length // 32), device=decay.device)
    age = queries[:, None] - torch.arange(length, device=decay.device)[None, :]
    kept = torch.exp(-decay.unsqueeze(-3) * age.clamp(min=0)[..., None]) * (age >= 0)[..., None]  # [..., Q, T, H]
    return kept.sum(-2).mean(-2)


def _share(mass: torch.Tensor, kind: str) -> torch.Tensor:
    """[L, H] -> what shares a budget: [1, 1] or [L, H]."""
    return mass.mean().view(1, 1) if kind == "rg10" else mass


def _retained(gates: nn.ModuleList, inputs: torch.Tensor, options: TrainingOptions) -> torch.Tensor:
    with torch.no_grad():
        mass = torch.stack([_mass(-gate(x.float())) for gate, x in zip(gates, inputs, strict=True)])
    return _share(mass, options.kind)


def _first_price(used: torch.Tensor, options: TrainingOptions) -> torch.Tensor:
    """The λ at which the closed form retains the budget: [1, 1] or [L, H]."""
    shape = (1, 1) if options.kind == "rg10" else (used.shape[0], used.shape[2])
    low, high = (torch.full(shape, value, device=used.device) for value in (-25.0, 25.0))
    for _ in range(30):
        middle = (low + high) / 2
        decay = (middle.exp()[:, None, :] / used.clamp(min=LEAST)).sqrt()
        mass = _share(torch.stack([_mass(layer) for layer in decay.expand_as(used)]), options.kind)
        low, high = torch.where(mass > options.budget, middle, low), torch.where(mass > options.budget, high, middle)
    return middle.exp()
