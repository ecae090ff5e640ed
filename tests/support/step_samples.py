"""Samples and a tiny configuration for tests of one step on several ranks."""

from dataclasses import replace

import torch
from torch import Tensor

from detr.batch import Target
from detr.config import TransformConfig
from pipeline.config import OptimConfig, RunConfig
from tests.support.tiny_model import TINY_MODEL

MODEL = replace(TINY_MODEL, frozen_stages=0, dropout=0.0, num_queries=6)
# A clip norm so large that the gradient is left as it is.
CONFIG = RunConfig(model=MODEL, optim=OptimConfig(batch_size=8, clip_norm=1e9), transform=TransformConfig(crop=False))
UNEVEN = (0, 5, 1, 0, 9, 0, 0, 2)  # one image has more boxes than there are queries

Samples = list[tuple[Tensor, Target]]


def samples(boxes: tuple[int, ...]) -> Samples:
    """Images on equal canvases, so that padding cannot make a difference."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for image_id, count in enumerate(boxes):
        image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=generator)
        centres = 0.3 + 0.4 * torch.rand(count, 2, generator=generator)
        sizes = 0.1 + 0.2 * torch.rand(count, 2, generator=generator)
        labels = torch.randint(0, 4, (count,), generator=generator)
        masks = torch.rand(count, 64, 64, generator=generator) < 0.3
        made.append((image, Target(torch.cat([centres, sizes], 1), labels, image_id, (64, 64), masks)))
    return made
