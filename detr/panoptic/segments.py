"""Conversion of predictions to panoptic segments: every pixel of an image goes to one query, as in the paper.

The steps are those of the original's `PostProcessPanoptic`, and so are its segments, with three differences:

- Masks of a padded batch are resized to the canvas and cut, as those of detections are. The original stretches the canvas over
  the image, so that its figures hold for batches without padding only.
- A pixel is interpolated only if the original size keeps it, and again only if its query was dropped. Every query's pixels
  that stay are those that it has the largest logit of, which dropping other queries cannot change.
- An image without segments has no pixel of any; in the original all pixels have the id of its first segment.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from detr.geometry import Size
from detr.panoptic.picture import Picture
from detr.variant import Outputs, SigmoidOutputs

_SMALLEST = 4  # pixels; segments of as many or fewer are dropped


@dataclass(frozen=True)
class Segment:
    """Segment of an image: its label, the probability of that class, its pixels and the query that predicted it."""

    label: int
    score: float
    area: int
    query: int


@dataclass(frozen=True, eq=False)
class PanopticResult:
    """Segments of one image in the order of their queries, and each pixel's segment.

    indices: int32 [H, W] on the CPU, of the original size: index into `segments`. Without segments every pixel is -1;
    otherwise none is.
    """

    indices: Tensor
    segments: tuple[Segment, ...]


def panoptic(
    outputs: Outputs | SigmoidOutputs,
    original_sizes: Sequence[Size],
    sizes: Sequence[Size],
    canvas: Size | None,
    stuff: Sequence[bool],
    threshold: float = 0.85,
) -> list[PanopticResult]:
    """Return one `PanopticResult` per image; sizes are (height, width) in pixels.

    original_sizes: those of the results. sizes: those of the images on their canvas, without padding (`Batch.sizes`).
    canvas: that of the padded images; None takes the largest height and width of `sizes`.
    stuff: true for each label whose segments are merged, false for things; as many as the model has classes.
    threshold: a query counts if the probability of its best class is above it.
    Raise `ValueError` for a model without masks or "no object", and for sizes or labels of another number.
    """
    logits, grids = _checked(outputs, original_sizes, sizes, stuff)
    scores, labels = (best.cpu() for best in logits.detach().float().softmax(-1).max(-1))
    counted = (labels != len(stuff)) & (scores > threshold)
    canvas = canvas or (max((h for h, _ in sizes), default=1), max((w for _, w in sizes), default=1))
    results = []
    for image, keep in enumerate(counted):
        queries = keep.nonzero()[:, 0]
        found_labels, found_scores = labels[image, queries].tolist(), scores[image, queries].tolist()
        kept_grids = grids[image].detach()[queries.to(grids.device)].float()
        picture = Picture(kept_grids, canvas, sizes[image], original_sizes[image])
        indices, areas = _divide(picture, found_labels, stuff)
        found = zip(found_labels, found_scores, areas, queries.tolist(), strict=True)
        segments = tuple(Segment(*fields) for fields in found if fields[2])
        results.append(PanopticResult(torch.from_numpy(indices), segments))
    return results


def _checked(
    outputs: Outputs | SigmoidOutputs, original_sizes: Sequence[Size], sizes: Sequence[Size], stuff: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Return logits and masks of predictions that can be divided into segments."""
    if isinstance(outputs, SigmoidOutputs):
        raise ValueError("outputs: got a sigmoid per class, expected a softmax with 'no object'; use variant 'detr'")
    if outputs.masks is None:
        raise ValueError("outputs: got no masks, expected those of a model with a mask head; set masks=True")
    for name, given in (("original_sizes", original_sizes), ("sizes", sizes)):
        if len(given) != len(outputs.logits):
            raise ValueError(f"{name}: got {len(given)}, expected one per image, {len(outputs.logits)}")
    if len(stuff) != outputs.logits.shape[-1] - 1:
        raise ValueError(f"stuff: got {len(stuff)}, expected one per class, {outputs.logits.shape[-1] - 1}")
    return outputs.logits, outputs.masks


def _divide(picture: Picture, labels: Sequence[int], stuff: Sequence[bool]) -> tuple[npt.NDArray[np.int32], list[int]]:
    """Return each pixel's segment at the original size, int32, and the area of each query, 0 if it was dropped.

    In the first pass stuff is merged: a class counts for its first query, and its others are dropped. Their pixels then go to
    the largest logit that is left, be it of their class or not, as in the original.
    """
    first: dict[int, int] = {}
    for query, label in enumerate(labels):
        first.setdefault(label, query)
    merged = np.array([first[label] if stuff[label] else query for query, label in enumerate(labels)], np.int64)
    areas = picture.areas()
    alive = np.bincount(merged, weights=areas, minlength=len(labels)) > _SMALLEST
    while not alive[areas > 0].all():
        picture.keep(alive)
        areas = picture.areas()
        alive &= areas > _SMALLEST
    return picture.indices(alive), np.where(alive, areas, 0).tolist()
