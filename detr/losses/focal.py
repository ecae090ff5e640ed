"""Focal loss (Lin et al., 2017) of sigmoid classes, gamma 2, for all decoder layers at once."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

FIRST_LOGIT = -math.log((1 - 0.01) / 0.01)
"""Logit of every class at the start: a probability of 0.01, so that the many queries without an object cost little."""


def focal_loss(logits: Tensor, slots: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """Return the sums [L] over all queries and classes of logits [L, B, Q, K].

    The truth is 1 for the pairs of a query and its object's class, given by `slots`, the queries' indices among all of
    [L, B, Q], and `labels`, and 0 for all others.
    """
    sums: Tensor = _FocalLoss.apply(logits, slots * logits.shape[-1] + labels, alpha)
    return sums


class _FocalLoss(torch.autograd.Function):
    """Focal loss that keeps the logits only, with true: flat indices of the logits whose truth is 1.

    Autograd would keep six more tensors of that size; for the cells of a second stage each is 60 MB at true size.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, true: Tensor, alpha: float) -> Tensor:
        ctx.save_for_backward(logits, true)
        ctx.alpha = alpha
        loss = _loss(logits, 1 - alpha)
        loss.view(-1)[true] = _loss(-logits.reshape(-1)[true], alpha)
        return loss.flatten(1).sum(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, true = ctx.saved_tensors
        slope = _slope(logits, 1 - ctx.alpha)
        slope.view(-1)[true] = -_slope(-logits.reshape(-1)[true], ctx.alpha)
        return slope.mul_(gradient.view(-1, 1, 1, 1)), None, None


def _loss(away: Tensor, weight: float) -> Tensor:
    """Return weight * p^2 * -log(1 - p), where p = sigmoid(away) is the probability of what is not true."""
    return F.softplus(away).mul_(away.sigmoid().square_()).mul_(weight)


def _slope(away: Tensor, weight: float) -> Tensor:
    """Return the derivative of `_loss`: weight * p^2 * (2 (1 - p) * -log(1 - p) + p)."""
    wrong = away.sigmoid()
    return F.softplus(away).mul_(2 * (1 - wrong)).add_(wrong).mul_(wrong.square_()).mul_(weight)
