"""A tiny model with a mask head, and random targets with masks."""

from dataclasses import replace

import torch

from detr.batch import Target
from detr.config import ModelConfig
from detr.model import DETR, build_model

TINY = ModelConfig(
    backbone="tiny", norm="group", frozen_stages=0, hidden_dim=128, heads=8, encoder_layers=1, decoder_layers=2,
    feedforward_dim=64, dropout=0.0, num_queries=6, masks=True,
)  # fmt: skip


def build_masked(**changes: object) -> DETR:
    """Return the model of seed 0 with some fields of `TINY` changed."""
    torch.manual_seed(0)
    return build_model(replace(TINY, **changes), 4)  # type: ignore[arg-type]


def drawn_targets(*objects: int, size: tuple[int, int] = (64, 80)) -> list[Target]:
    """Return targets with the given numbers of objects; the masks of later images are smaller."""
    torch.manual_seed(1)
    made = []
    for i, n in enumerate(objects):
        boxes, (height, width) = torch.rand(n, 4) * 0.4 + 0.2, (size[0] - 8 * i, size[1] - 8 * i)
        made.append(Target(boxes, torch.randint(0, 4, (n,)), i, size, torch.rand(n, height, width) > 0.6))
    return made
