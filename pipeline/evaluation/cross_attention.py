"""Cross-attention of the last decoder layer, captured in one forward pass: the cells that each query has read.

Attention runs without storing its weights, so they are computed a second time from the layer's inputs. Only `attend_with`
does that, with a hook that it removes: other passes of the model, and this one's predictions, are as they are without it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detr.deformable.attention import DeformableAttention
from detr.transformer import Attention
from detr.variant import DETR, Outputs, SigmoidOutputs


@dataclass(frozen=True, eq=False)
class CellWeights:
    """Attention over the cells of the feature map: the mean over heads, [B, Q, h, w].

    The weights of a query add up to 1; padded cells have 0. The map covers the canvas.
    """

    weights: Tensor


@dataclass(frozen=True, eq=False)
class PointWeights:
    """Attention of Deformable DETR: the points of all heads and levels that a query reads, and their weights.

    locations: [B, Q, P, 2], x and y as fractions of the canvas; points may lie outside of it, or in its padding, where
    they read 0. weights: [B, Q, P]; those of a query add up to 1.
    """

    locations: Tensor
    weights: Tensor


CrossAttention = CellWeights | PointWeights


@torch.no_grad()
def attend_with(
    model: DETR, images: Tensor, padding: Tensor | None = None
) -> tuple[Outputs | SigmoidOutputs, CrossAttention]:
    """Return what `model(images, padding)` returns, and the cross-attention of its last decoder layer.

    The model is neither compiled nor wrapped for several workers.
    """
    projection: nn.Module = model.input_proj  # type: ignore[assignment]
    with _recorded(_last_attention(model)) as inputs, _recorded(projection) as features:
        outputs = model(images, padding)
    (module, arguments, _), (_, _, projected) = inputs[0], features[0]
    if isinstance(module, DeformableAttention):
        query, reference, _, _, shapes = arguments
        locations, weights = module.points_of(query, reference, shapes)
        return outputs, PointWeights(locations.flatten(2, 4), weights.flatten(2) / module.heads)
    weights = _weights(module, *arguments)
    return outputs, CellWeights(weights.mean(1).reshape(*weights.shape[::2], *projected.shape[-2:]))


def _last_attention(model: DETR) -> nn.Module:
    """Return the module of the last decoder layer in which queries attend to cells."""
    layer = model.transformer.decoder.layers[-1]
    return layer.multihead_attn if hasattr(layer, "multihead_attn") else layer.cross_attn  # type: ignore[no-any-return]


@contextmanager
def _recorded(module: nn.Module) -> Iterator[list[tuple[Any, tuple[Any, ...], Any]]]:
    """Yield a list of the module, its arguments and its result for each call in the block."""
    calls: list[tuple[Any, tuple[Any, ...], Any]] = []
    handle = module.register_forward_hook(lambda *call: calls.append(call))
    try:
        yield calls
    finally:
        handle.remove()


def _weights(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the weights [B, heads, Q, N] of attention with these arguments."""
    if isinstance(module, Attention):  # else query and key are projected already, and split into heads
        width = query.shape[-1] // module.heads
        weights, biases = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
        query, key = (
            F.linear(x, weight, bias).view(*x.shape[:2], module.heads, width).transpose(1, 2)
            for x, weight, bias in zip((query, key), weights, biases, strict=False)
        )
    scores = query.float() @ key.float().transpose(-2, -1) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1)
