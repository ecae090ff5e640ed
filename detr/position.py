"""Position encodings of cells: fixed sines (the paper's choice, appendix A.4) or learned rows and columns.

Departure from the original: beyond 50 rows or columns (DC5 has 84 at 1333 pixels), where the original fails, the learned
vectors are interpolated linearly over the image. Up to 50 nothing differs.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detr.config import ModelConfig

_LEARNED_CELLS = 50  # rows and columns of the original's learned positions
_SMALLEST = 1e-5  # the distance of a fraction from 0 and 1 whose inverse sigmoid is the largest, as in the originals


class SinePosition(nn.Module):
    """Sines and cosines of the row, then of the column, each normalised to the image inside the padding.

    back: cells by which rows and columns, counted from 1, are moved back: 0 in DETR, 0.5 in Deformable DETR.
    """

    def __init__(self, channels: int, temperature: float, back: float = 0.0) -> None:
        super().__init__()
        self.channels = channels
        self.temperature = temperature
        self.back = back

    def forward(self, features: Tensor, padding: Tensor | None) -> Tensor:
        """Return float32 [B or 1, h * w, channels] for features [B, C, h, w] and their padding [B, h, w] or None."""
        if padding is None:
            height, width = features.shape[-2:]
            grid = _sine_grid if torch.compiler.is_compiling() else _kept_sine_grid
            return grid(height, width, self.channels, self.temperature, self.back, features.device)
        inside = ~padding
        # Of integers, which have one sum in any order: for fp32, CUDA has no kernel that promises it.
        rows, columns = inside.cumsum(1, dtype=torch.int32), inside.cumsum(2, dtype=torch.int32)
        rows = (rows - self.back) / (rows[:, -1:, :] + 1e-6)
        columns = (columns - self.back) / (columns[:, :, -1:] + 1e-6)
        return sine_vectors(rows, columns, self.channels, self.temperature).flatten(1, 2)


class LearnedPosition(nn.Module):
    """One trained vector per column, then one per row: 50 of each, as in the original; interpolated for more cells."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(_LEARNED_CELLS, channels // 2)
        self.col_embed = nn.Embedding(_LEARNED_CELLS, channels // 2)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, features: Tensor, padding: Tensor | None) -> Tensor:
        """Return [1, h * w, channels] for features [B, C, h, w]; the padding is not used."""
        height, width = features.shape[-2:]
        columns = _learned(self.col_embed.weight, width).expand(height, -1, -1)
        rows = _learned(self.row_embed.weight, height)[:, None].expand(-1, width, -1)
        return torch.cat([columns, rows], dim=-1).flatten(0, 1)[None]


def build_position(config: ModelConfig, back: float = 0.0) -> nn.Module:
    """Return the configured positions; `back` is for sines, see `SinePosition`."""
    if config.position == "learned":
        return LearnedPosition(config.hidden_dim)
    return SinePosition(config.hidden_dim, config.position_temperature, back)


def _learned(vectors: Tensor, cells: int) -> Tensor:
    """Return the first `cells` vectors, [cells, C], or interpolate if there are fewer, first to first and last to last."""
    if cells <= len(vectors):
        return vectors[:cells]
    return F.interpolate(vectors.T[None], cells, mode="linear", align_corners=True)[0].T


def sine_vectors(rows: Tensor, columns: Tensor, channels: int, temperature: float) -> Tensor:
    """Return [..., channels] for rows and columns [...] given as fractions of the image, 0 to 1."""
    frequencies = _frequencies if torch.compiler.is_compiling() else _kept_frequencies
    angles = torch.stack([rows, columns], dim=-1)[..., None] * frequencies(channels, temperature, rows.device)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-3)


def _frequencies(channels: int, temperature: float, device: torch.device) -> Tensor:
    exponents = torch.arange(0, channels // 2, 2, dtype=torch.float32, device=device) / (channels // 2)
    return 2 * math.pi / temperature**exponents


@lru_cache(maxsize=16)
def _kept_frequencies(channels: int, temperature: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _frequencies(channels, temperature, device)


def _sine_grid(height: int, width: int, channels: int, temperature: float, back: float, device: torch.device) -> Tensor:
    rows = (torch.arange(1, height + 1, device=device) - back) / (height + 1e-6)
    columns = (torch.arange(1, width + 1, device=device) - back) / (width + 1e-6)
    grid = sine_vectors(rows[:, None].expand(-1, width), columns.expand(height, -1), channels, temperature)
    return grid.flatten(0, 1)[None]


@lru_cache(maxsize=64)
def _kept_sine_grid(
    height: int, width: int, channels: int, temperature: float, back: float, device: torch.device
) -> Tensor:
    # Cached per shape, on which alone it depends without padding. An inference tensor could not be used in training.
    with torch.inference_mode(False):
        return _sine_grid(height, width, channels, temperature, back, device)


def inverse_sigmoid(fraction: Tensor) -> Tensor:
    """Return log(x / (1 - x)), with x and 1 - x of at least 1e-5, as in the originals of the variants."""
    fraction = fraction.clamp(0, 1)
    return torch.log(fraction.clamp(min=_SMALLEST) / (1 - fraction).clamp(min=_SMALLEST))


def moved_boxes(reference: Tensor, change: Tensor) -> Tensor:
    """Return the boxes [..., 4] of references of 2 numbers, the centre, or 4, changed before their sigmoid."""
    start = inverse_sigmoid(reference)
    if start.shape[-1] == 4:
        return (change + start).sigmoid()
    return torch.cat([change[..., :2] + start, change[..., 2:]], -1).sigmoid()


def at_least_fp32(tensor: Tensor) -> Tensor:
    """Return the tensor in fp32 if its type is narrower, else unchanged."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
