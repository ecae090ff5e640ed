"""A tiny model of each variant, and images of two sizes for it."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from detr.config import DeformableConfig, ModelConfig
from detr.model import DETR, build_model

TINY = ModelConfig(
    backbone="tiny", norm="group", frozen_stages=0, hidden_dim=32, heads=2, encoder_layers=1, decoder_layers=2,
    feedforward_dim=16, num_queries=5, dropout=0.0,
)  # fmt: skip
TWO_STAGE = DeformableConfig(levels=3, box_refine=True, two_stage=True)
VARIANTS = {
    "conditional": replace(TINY, variant="conditional"),
    "one level": replace(TINY, variant="deformable", deformable=DeformableConfig(levels=1)),
    "three levels": replace(TINY, variant="deformable", deformable=DeformableConfig(levels=3)),
    "two stages": replace(TINY, variant="deformable", deformable=TWO_STAGE),
    "hybrid": replace(
        TINY,
        variant="deformable",
        deformable=replace(TWO_STAGE, mixed_selection=True, look_forward_twice=True, one_to_many_queries=4),
    ),
}


def built(config: ModelConfig, **changes: Any) -> DETR:
    """Build the model for three classes, always with the same weights."""
    torch.manual_seed(0)
    return build_model(replace(config, **changes), 3)


def images(batch: int = 2) -> tuple[Tensor, Tensor]:
    """Return images on canvases of 64 x 80, of which all but the first are padded, and their padding."""
    padding = torch.zeros(batch, 64, 80, dtype=torch.bool)
    padding[1:, :, 56:] = True
    drawn = torch.randn(batch, 3, 64, 80, generator=torch.Generator().manual_seed(1))
    return drawn.masked_fill(padding[:, None], 0.0), padding
