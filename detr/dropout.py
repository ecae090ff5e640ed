"""Dropout that draws fast on a CPU, and masks of what it keeps."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detr.kept import number

_LEVELS = 1 << 16


class Dropout(nn.Module):
    """Dropout that draws faster on a CPU, where torch draws a number per element, one after another.

    Four elements share a 64-bit number, 16 bits each, so a probability is rounded to a multiple of 2^-16. Kept elements
    are scaled by the rounded one, so that the mean is exact. On other devices, and compiled, it is torch's.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.dropout(x, self.probability)
        kept: Tensor = _Dropped.apply(x, keep_mask(x.shape, self.probability), 1 / keep_probability(self.probability))
        return kept


class _Dropped(torch.autograd.Function):
    """Kept elements times a factor; autograd's own gradient and plain numbers take eleven operations instead of six."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.factor = factor
        # Not a product with the mask: torch multiplies by booleans five times slower than it chooses by them.
        wide = x.dtype if x.dtype == torch.float64 else torch.float32  # bf16 would round the factor
        return torch.where(keep, x, number(0.0, x.dtype)).mul_(number(factor, wide))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (keep,) = ctx.saved_tensors
        return _Dropped.apply(gradient, keep, ctx.factor), None, None


def keep_mask(shape: torch.Size, probability: float) -> Tensor:
    """Return a bool mask on the host, true to keep, from torch's generator."""
    words = torch.empty((shape.numel() + 3) // 4, dtype=torch.int64).random_(-(1 << 63), None)
    least = number(_dropped(probability) - _LEVELS // 2, torch.int16)
    return (words.view(torch.int16)[: shape.numel()] >= least).view(shape)


def keep_probability(probability: float) -> float:
    """Return the share of elements that `keep_mask` keeps on average."""
    return 1 - _dropped(probability) / _LEVELS


def _dropped(probability: float) -> int:
    return min(round(probability * _LEVELS), _LEVELS - 1)  # something is always kept
