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
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from detr.geometry import Size
from detr.variant import Outputs, SigmoidOutputs

_SMALLEST = 4  # pixels; segments of as many or fewer are dropped

_Indices = npt.NDArray[np.int64]


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
        picture = _Picture(kept_grids, canvas, sizes[image], original_sizes[image])
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


def _divide(
    picture: "_Picture", labels: Sequence[int], stuff: Sequence[bool]
) -> tuple[npt.NDArray[np.int32], list[int]]:
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


class _Picture:
    """Division of an image into the pixels of its queries, at the rows and columns that the original size keeps."""

    def __init__(self, grids: Tensor, canvas: Size, size: Size, original: Size) -> None:
        """Give each pixel to the query with the largest logit, of equal ones the first; grids: logits [Q, h, w]."""
        device = grids.device
        self._rows = _Axis(grids.shape[1], canvas[0], size[0], original[0], device)
        self._columns = _Axis(grids.shape[2], canvas[1], size[1], original[1], device)
        # Columns first and then rows, in which `F.interpolate` adds as well.
        across, down = self._columns, self._rows
        shape = (*grids.shape[:2], len(across.share))  # `gather` takes a fifth of the time of `index_select` here
        left, right = grids.gather(2, across.low.expand(shape)), grids.gather(2, across.high.expand(shape))
        self._wide = torch.lerp(left, right, across.share)
        shape = (len(down.share), len(across.share))
        self._winners = torch.full(shape, 0 if len(grids) else -1, dtype=torch.int16, device=device)
        best = torch.full(shape, -torch.inf, device=device)
        for query, grid in enumerate(self._wide):
            values = torch.lerp(grid.index_select(0, down.low), grid.index_select(0, down.high), down.share[:, None])
            self._winners.masked_fill_(values > best, query)
            torch.maximum(best, values, out=best)

    def keep(self, alive: npt.NDArray[np.bool_]) -> None:
        """Give the pixels of all other queries to these, or to none if there are none left."""
        left = np.flatnonzero(alive).tolist()
        lost = ~torch.from_numpy(alive).to(self._winners.device)[self._winners.long()]
        rows, columns = lost.nonzero(as_tuple=True)
        width, share = self._winners.shape[1], self._rows.share[rows]
        low, high = self._rows.low[rows] * width + columns, self._rows.high[rows] * width + columns
        best = torch.full_like(share, -torch.inf)
        winners = torch.full_like(rows, left[0] if left else -1, dtype=torch.int16)
        for query in left:
            grid = self._wide[query].flatten()
            values = torch.lerp(grid.index_select(0, low), grid.index_select(0, high), share)
            winners.masked_fill_(values > best, query)
            torch.maximum(best, values, out=best)
        self._winners[rows, columns] = winners

    def areas(self) -> _Indices:
        """Return the pixels of each query at the original size."""
        from_none = self._winners.cpu().numpy().reshape(-1) + 1
        rows, columns = self._rows.repeats, self._columns.repeats
        # Repeats appear only where the original is larger than the image in the model, which is rare.
        pixels = np.outer(rows, columns).reshape(-1) if rows.max() > 1 or columns.max() > 1 else None
        return np.bincount(from_none, pixels, minlength=len(self._wide) + 1)[1:].astype(np.int64)

    def indices(self, alive: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
        """Return the query of each pixel at the original size, counted among those `alive`; -1 if there are none."""
        numbers = np.append(np.cumsum(alive) - 1, -1).astype(np.int32)  # the last for a winner of -1
        winners = numbers[self._winners.cpu().numpy()]
        return np.ascontiguousarray(winners.repeat(self._rows.repeats, 0).repeat(self._columns.repeats, 1))


class _Axis:
    """Rows of the canvas that the original size keeps, and the rows of the grid between which they lie; or columns.

    low, high: rows of the grid. share: float32, of the higher one. repeats: how many rows of the original size have it.
    """

    def __init__(self, grid: int, canvas: int, size: int, original: int, device: torch.device) -> None:
        kept, self.repeats = np.unique(_nearest(size, original), return_counts=True)
        # In float32 and without clamping at the far side, as `F.interpolate` does.
        scale = np.float32(grid) / np.float32(canvas)
        position = np.maximum(scale * (kept.astype(np.float32) + np.float32(0.5)) - np.float32(0.5), 0)
        low = position.astype(np.int64)
        self.low = torch.from_numpy(low).to(device)
        self.high = torch.from_numpy(np.minimum(low + 1, grid - 1)).to(device)
        self.share = torch.from_numpy((position - low).astype(np.float32)).to(device)


@lru_cache(maxsize=4096)
def _nearest(size: int, original: int) -> npt.NDArray[np.int32]:
    """Return the row that Pillow's nearest neighbour takes for each row of the original size; columns are alike.

    It differs from exact arithmetic, and so from torch's, at some sizes.
    """
    places = Image.fromarray(np.arange(size, dtype=np.int32)[None])
    row: npt.NDArray[np.int32] = np.asarray(places.resize((original, 1), Image.Resampling.NEAREST))[0]
    return row
