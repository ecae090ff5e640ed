"""Feature levels: the backbone's last stages and further ones at half the size, each with its geometry.

The padding of every level is the image's, resized from full size. A cell's centre is a fraction of the image without its
padding; times the level's valid ratio it is a fraction of the canvas, at which attention samples.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detr.backbone import ResNet
from detr.config import GROUPS, ModelConfig
from detr.deformable.attention import Shapes, sizes_of

_STAGES = {"tiny": 2}  # last stages of the backbone, those of stride 8 and more; three of a ResNet


class Geometry(NamedTuple):
    """Geometry of all levels. Tensors of canvases without padding have a batch of 1.

    padding: [B, S], true = no image; None if no image is padded. centres: [B, S, 2], x and y of each cell as fractions
    of the image, above 1 where padded. valid_ratios: [B, L, 2], the share of columns and rows that hold the image.
    level: [S], the number of each cell's level.
    """

    shapes: Shapes
    padding: Tensor | None
    centres: Tensor
    valid_ratios: Tensor
    level: Tensor


class LevelProjections(nn.ModuleList):
    """Convolution and group norm of each level: 1x1 for stages of the backbone, 3x3 with stride 2 for further levels."""

    def __init__(self, config: ModelConfig, body: ResNet) -> None:
        levels, channels = config.deformable.levels, config.hidden_dim
        stages = min(levels, _STAGES.get(config.backbone, 3))
        inputs = body.stage_channels[-stages:]
        modules = [nn.Conv2d(width, channels, 1) for width in inputs]
        width = inputs[-1]  # the first further level is made of the backbone's last stage itself
        for _ in range(levels - stages):
            modules.append(nn.Conv2d(width, channels, 3, stride=2, padding=1))
            width = channels
        super().__init__(nn.Sequential(conv, nn.GroupNorm(GROUPS, channels)) for conv in modules)
        self.stages = stages
        for conv in modules:
            nn.init.xavier_uniform_(conv.weight)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)

    def forward(self, stages: Sequence[Tensor]) -> list[Tensor]:
        """Return [B, C, h, w] of each level, the finest first, for the backbone's stages, the finest first."""
        taken, projections = stages[-self.stages :], list(self)
        levels: list[Tensor] = [project(stage) for project, stage in zip(projections, taken, strict=False)]
        previous = taken[-1]
        for project in projections[self.stages :]:
            previous = project(previous)
            levels.append(previous)
        return levels


def level_padding(padding: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """Return the padding [B, h, w] of a level for the padding of the canvas."""
    return None if padding is None else F.interpolate(padding[:, None].float(), shape)[:, 0].bool()


def geometry(shapes: Shapes, paddings: Sequence[Tensor | None], like: Tensor) -> Geometry:
    """Return the geometry of levels with these paddings, on the device and with the type of `like`."""
    centres, ratios = [], []
    for (height, width), size, padding in zip(shapes, sizes_of(shapes, like), paddings, strict=True):
        # As in the original, valid columns are counted in the first row, and valid rows in the first column.
        if padding is None:
            valid = size[None]
        else:
            valid = torch.stack([(~padding[:, 0]).sum(1), (~padding[:, :, 0]).sum(1)], -1).to(like.dtype)
        columns = torch.arange(width, dtype=like.dtype, device=like.device) + 0.5
        rows = torch.arange(height, dtype=like.dtype, device=like.device) + 0.5
        grid = torch.stack([columns.expand(height, -1), rows[:, None].expand(-1, width)], -1).flatten(0, 1)
        centres.append(grid / valid[:, None])
        ratios.append(valid / size)
    flat = [padding.flatten(1) for padding in paddings if padding is not None]
    levels = [torch.full((h * w,), number, device=like.device) for number, (h, w) in enumerate(shapes)]
    return Geometry(
        shapes,
        torch.cat(flat, 1) if flat else None,
        torch.cat(centres, 1),
        torch.stack(ratios, 1),
        torch.cat(levels),
    )
