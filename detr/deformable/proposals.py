"""Second stage: the encoder's best cells become the first boxes of the queries."""

import torch
from torch import Tensor

from detr.config import ConfigError
from detr.deformable.levels import Geometry
from detr.position import sine_vectors

_SIDE = (
    0.05  # width and height of a cell's box in the finest level, as fractions of the image; doubled in each next level
)
_EDGE = 0.01  # boxes with a number closer to 0 or 1 are no proposals
_TEMPERATURE = 10000.0


def cell_boxes(geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Return each cell's box before its sigmoid, [B, S, 4] cxcywh, and true where it is no proposal, [B, S].

    The box is infinite where it is no proposal, so that its sigmoid is (1, 1, 1, 1) whatever is added.
    """
    sides = _SIDE * 2.0 ** geometry.level.to(geometry.centres.dtype)
    boxes = torch.cat([geometry.centres, sides[:, None].expand(geometry.centres.shape[0], -1, 2)], -1)
    invalid = ~((boxes > _EDGE) & (boxes < 1 - _EDGE)).all(-1)
    if geometry.padding is not None:
        invalid = invalid | geometry.padding
    return torch.log(boxes / (1 - boxes)).masked_fill(invalid[..., None], torch.inf), invalid


def best_cells(scores: Tensor, queries: int) -> Tensor:
    """Return the cells [B, queries] with the highest scores [B, S], the best first.

    Raise `ConfigError` if there are fewer cells than queries.
    """
    batch, cells = scores.shape
    if cells < queries and batch:
        raise ConfigError(
            f"images on this canvas have {cells} cells in all levels; expected at least {queries}, one for each query, "
            "in a model with two stages: use larger images or lower num_queries"
        )
    return scores.topk(min(queries, cells), 1).indices


def box_vectors(boxes: Tensor, channels: int) -> Tensor:
    """Return vectors [B, Q, 2 * channels] of boxes [B, Q, 4]: sines and cosines of each number, channels / 2 of each."""
    x, y, width, height = boxes.unbind(-1)
    pairs = [sine_vectors(x, y, channels, _TEMPERATURE), sine_vectors(width, height, channels, _TEMPERATURE)]
    return torch.cat(pairs, -1)
