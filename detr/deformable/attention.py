"""Deformable attention: each query reads a few points of every feature level, whose offsets and weights it predicts.

The original samples with a CUDA kernel, or in plain PyTorch with all samples of all levels in memory at once, twice. Here
the levels are added up one after another, and the backward pass samples again, so that the samples of one level are
the most that exists. The offsets stay in fp32 under autocast: bf16 has 8 bits, so on a map of 100 cells a point would
move in steps of up to half a cell.
"""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detr.position import at_least_fp32

Shapes = tuple[tuple[int, int], ...]
"""Height and width of each feature level in cells."""
_CACHE = 512 * 2**10
"""Bytes of samples that a thread of a CPU computes at a time: one row of N at true size, many of a small model."""


class DeformableAttention(nn.Module):
    """Multi-head deformable attention over the cells of several levels, with the original's parameters."""

    def __init__(self, channels: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        samples = heads * levels * points
        self.sampling_offsets = nn.Linear(channels, samples * 2)
        self.attention_weights = nn.Linear(channels, samples)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the original's first weights: head m looks in the direction 2 pi m / heads, point p at p + 1 cells."""
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        for linear in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(linear.weight)
        nn.init.zeros_(self.attention_weights.bias)
        angles = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions /= directions.abs().amax(-1, keepdim=True)
        distances = torch.arange(1, self.points + 1, dtype=torch.float32)
        offsets = directions[:, None, None] * distances[:, None]
        self.sampling_offsets.bias.copy_(offsets.expand(-1, self.levels, -1, -1).flatten())

    def forward(
        self, query: Tensor, reference: Tensor, cells: Tensor, padding: Tensor | None, shapes: Shapes
    ) -> Tensor:
        """Return [B, Q, C] for a query [B, Q, C].

        reference: [B or 1, Q or 1, L, 2 or 4], points or boxes (cxcywh) as fractions of the canvas, in fp32.
        cells: [B, S, C], the cells of all levels, S = sum of height * width. padding: [B, S], true = read as 0.
        """
        value = self.value_proj(cells)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0.0)
        locations, weights = self.points_of(query, reference, shapes)
        with torch.autocast(query.device.type, enabled=False):
            heads = at_least_fp32(value).view(*value.shape[:2], self.heads, value.shape[-1] // self.heads)
            sampled = sample(heads, locations, weights, shapes)
        return self.output_proj(sampled.to(value.dtype))  # type: ignore[no-any-return]

    def points_of(self, query: Tensor, reference: Tensor, shapes: Shapes) -> tuple[Tensor, Tensor]:
        """Return the points [B, Q, heads, L, P, 2] that queries read, as fractions of the canvas, and their weights.

        The weights [B, Q, heads, L, P] of a head add up to 1. Both are in fp32.
        """
        batch, queries, _ = query.shape
        layout = (batch, queries, self.heads, self.levels, self.points)
        weights = self.attention_weights(query).view(*layout[:3], self.levels * self.points).softmax(-1).view(layout)
        with torch.autocast(query.device.type, enabled=False):
            wide = at_least_fp32(query)
            offsets = F.linear(
                wide, at_least_fp32(self.sampling_offsets.weight), at_least_fp32(self.sampling_offsets.bias)
            ).view(*layout, 2)
            return _locations(at_least_fp32(reference), offsets, shapes), at_least_fp32(weights)


def _locations(reference: Tensor, offsets: Tensor, shapes: Shapes) -> Tensor:
    """Return points [B, Q, heads, L, P, 2] as fractions of the canvas.

    Offsets are in cells of their level from a point, and in fractions of half the box divided by P from a box.
    """
    centre = reference[:, :, None, :, None, :2]
    if reference.shape[-1] == 4:
        return centre + offsets * (reference[:, :, None, :, None, 2:] * (0.5 / offsets.shape[-2]))
    return centre + offsets / sizes_of(shapes, offsets)[:, None]


def sizes_of(shapes: Shapes, like: Tensor) -> Tensor:
    """Return width and height of each level in cells, [L, 2], with type and device of `like`, copied there once."""
    kept = _sizes if torch.compiler.is_compiling() else _kept_sizes
    return kept(shapes, like.dtype, like.device)


def _sizes(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(shapes, dtype=dtype, device=device).flip(-1)


@cache  # without a bound, because a CUDA graph keeps reading what it was captured with
def _kept_sizes(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be used in training
        return _sizes(shapes, dtype, device)


def sample(value: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes) -> Tensor:
    """Return the weighted sums [B, Q, heads * D] of bilinear samples; samples outside of a level are 0.

    value: [B, S, heads, D]. locations: [B, Q, heads, L, P, 2], x then y, 0 to 1. weights: [B, Q, heads, L, P].
    """
    batch, cells, heads, width = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    # Heads become rows of the batch, and levels come first, so that each level is one contiguous block.
    maps = value.permute(0, 2, 3, 1).reshape(batch * heads, width, cells)
    grid = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).reshape(len(shapes), batch * heads, queries, points, 2)
    shares = weights.permute(3, 0, 2, 1, 4).reshape(len(shapes), batch * heads, queries, points)
    traced = torch.compiler.is_compiling() or torch.compiler.is_exporting()
    if traced or not torch.is_grad_enabled() or not batch or not queries:
        summed = _sum_of_levels(maps, grid, shares, shapes)
    else:
        summed = _Sample.apply(maps, grid, shares, shapes)
    return summed.view(batch, heads, width, queries).permute(0, 3, 1, 2).flatten(2)


def _level_maps(maps: Tensor, shapes: Shapes) -> list[Tensor]:
    """Return views [N, D, height, width] of the cells [N, D, S] of each level."""
    levels = torch.split(maps, [height * width for height, width in shapes], -1)
    return [level.unflatten(-1, shape) for level, shape in zip(levels, shapes, strict=True)]  # type: ignore[no-untyped-call]


def _read(level: Tensor, points: Tensor) -> Tensor:
    """Return [N, D, Q, P] for a level [N, D, h, w] and points [N, Q, P, 2], -1 to 1."""
    return F.grid_sample(level, points, mode="bilinear", padding_mode="zeros", align_corners=False)


def _sum_of_levels(maps: Tensor, grid: Tensor, shares: Tensor, shapes: Shapes) -> Tensor:
    summed = [
        (_read(level, points) * share[:, None]).sum(-1)
        for level, points, share in zip(_level_maps(maps, shapes), grid, shares, strict=True)
    ]
    return torch.stack(summed).sum(0) if len(summed) > 1 else summed[0]


class _Sample(torch.autograd.Function):
    """Weighted sum of samples [N, D, Q] that keeps its inputs only, and samples again in the backward pass.

    maps: [N, D, S]. grid: [L, N, Q, P, 2]. shares: [L, N, Q, P]. On a CPU, a few rows of N are computed at a time, so
    that their samples stay in its cache.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, grid: Tensor, shares: Tensor, shapes: Shapes) -> Tensor:
        ctx.save_for_backward(maps, grid, shares)
        ctx.shapes = shapes
        summed = maps.new_zeros(*maps.shape[:2], grid.shape[2])
        for rows in _rows(maps, grid):
            levels = _level_maps(maps[rows], shapes)
            for level, points, share in zip(levels, grid[:, rows], shares[:, rows], strict=True):
                summed[rows] += _read(level, points).mul_(share[:, None]).sum(-1)
        return summed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        maps, grid, shares = ctx.saved_tensors
        of_maps, of_grid, of_shares = torch.empty_like(maps), torch.empty_like(grid), torch.empty_like(shares)
        for rows in _rows(maps, grid):
            outer, target = gradient[rows, ..., None], _level_maps(of_maps[rows], ctx.shapes)
            for number, level in enumerate(_level_maps(maps[rows], ctx.shapes)):
                points = grid[number, rows]
                of_shares[number, rows] = _read(level, points).mul_(outer).sum(1)
                of_level, of_grid[number, rows] = torch.ops.aten.grid_sampler_2d_backward(
                    outer * shares[number, rows][:, None], level, points, 0, 0, False, [True, True]
                )
                target[number].copy_(of_level)
        return of_maps, of_grid, of_shares, None


def _rows(maps: Tensor, grid: Tensor) -> list[slice]:
    """Return the rows of N that are computed together."""
    size = len(maps)
    if maps.device.type == "cpu":
        samples = maps.shape[1] * grid.shape[2] * grid.shape[3] * maps.element_size()
        size = max(1, torch.get_num_threads()) * max(1, _CACHE // samples)
    return [slice(start, start + size) for start in range(0, len(maps), size)]
