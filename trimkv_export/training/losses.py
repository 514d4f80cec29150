"""The objective of TrimKV and DBTrimKV (arXiv 2512.03324, 2605.09649), with bounded memory."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

__all__ = ["capacity_loss", "prediction_losses"]

CHUNK = 64  # positions whose logits exist at a time


def prediction_losses(
    head: nn.Module, weighted: torch.Tensor, full: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far the weighted model's predictions are from the full one's, and from the text: two means.

    Logits of CHUNK positions exist at a time, in the backward pass too.

    Args:
        head: makes logits of hidden states.
        weighted: hidden states [P, d] of the model with weighted attention.
        full: hidden states [P, d] of the plain model.
        targets: tokens [P] that follow.

    Returns:
        KL of the plain model's distribution to the weighted one's; loss of the next token.
    """

    def chunk(ours: torch.Tensor, theirs: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            wanted = head(theirs).float().log_softmax(-1)
        log_probability = head(ours).float().log_softmax(-1)
        divergence = functional.kl_div(log_probability, wanted, reduction="sum", log_target=True)
        return divergence, functional.nll_loss(log_probability, tokens, reduction="sum")

    parts = zip(*(x.split(CHUNK) for x in (weighted, full, targets)), strict=True)
    sums = [checkpoint(chunk, *part, use_reentrant=False) for part in parts]
    divergence, loss = (torch.stack(values).sum() / len(targets) for values in zip(*sums, strict=True))
    return divergence, loss


def capacity_loss(log_beta: Sequence[torch.Tensor], kind: str, budget: int, queries: torch.Tensor) -> torch.Tensor:
    """How far the retained mass is above the budget, for each layer's log β [B, H, T]: a scalar.

    At position t a stream retains Σ_{i ≤ t} β_i^(t − i) tokens. rg may retain M in each stream, rg10 L·H·M in all. The
    excess is divided by t − M, what there is beyond the budget, and averaged where it is not zero, as in the official
    `compute_retention_loss`.

    Args:
        log_beta: of all layers.
        kind: "rg" or "rg10".
        budget: M.
        queries: the positions t that are looked at [Q], ascending.
    """
    length = log_beta[0].shape[-1]
    age = queries[:, None] - torch.arange(length, device=queries.device)[None, :]  # [Q, T]
    past, age = age >= 0, age.clamp(min=0).float()

    def mass(values: torch.Tensor) -> torch.Tensor:
        return ((values.float()[:, :, None, :] * age).exp() * past).sum(-1)  # [B, H, Q]

    retained = torch.cat([checkpoint(mass, values, use_reentrant=False) for values in log_beta], dim=1)
    share = retained.mean(1) if kind == "rg10" else retained
    excess = ((share - budget) / (queries - budget).clamp(min=1)).relu()
    return excess.sum() / (excess > 0).sum().clamp(min=1)
