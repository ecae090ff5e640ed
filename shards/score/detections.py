"""Detections of a model on many images, in columns, for scoring, drawing and export."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shards.arrays import Ints
from shards.errors import ShardError


@dataclass(frozen=True, eq=False)
class Detections:
    """Detections on many images, in any order; equal scores in one image rank in the given order.

    image_ids: int64 [M], original image ids.
    labels: int64 [M], labels of the manifest (0..K-1).
    scores: float32 [M].
    boxes_xywh: float64 [M, 4], pixels of the original image.
    masks: object [M] of bytes, run lengths of masks of the original image's size, as `encode_masks` returns them; None
    if the model predicts no masks.
    """

    image_ids: Ints
    labels: Ints
    scores: npt.NDArray[np.float32]
    boxes_xywh: npt.NDArray[np.float64]
    masks: npt.NDArray[np.object_] | None = None

    def __post_init__(self) -> None:
        count = len(self.image_ids)
        shapes = [column.shape for column in (self.image_ids, self.labels, self.scores, self.boxes_xywh)]
        if shapes != [(count,), (count,), (count,), (count, 4)]:
            raise ShardError(f"got detection columns of shapes {shapes}, expected [M], [M], [M] and [M, 4]")
        if self.masks is not None and self.masks.shape != (count,):
            raise ShardError(f"got masks of shape {self.masks.shape}, expected one for each of the {count} detections")

    def __len__(self) -> int:
        return len(self.image_ids)

    def take(self, chosen: Ints | npt.NDArray[np.bool_]) -> "Detections":
        """Return the detections at `chosen`, positions or a mask, in that order."""
        return Detections(
            self.image_ids[chosen],
            self.labels[chosen],
            self.scores[chosen],
            self.boxes_xywh[chosen],
            None if self.masks is None else self.masks[chosen],
        )

    @classmethod
    def empty(cls, masks: bool = False) -> "Detections":
        """Return no detections, of a model with or without masks."""
        ids = np.zeros(0, np.int64)
        runs = np.empty(0, np.object_) if masks else None
        return cls(ids, ids, np.zeros(0, np.float32), np.zeros((0, 4), np.float64), runs)

    @classmethod
    def concatenate(cls, groups: Sequence["Detections"]) -> "Detections":
        """Return all detections of `groups`, in that order; raise `ShardError` if only some have masks."""
        masks = [group.masks for group in groups if group.masks is not None]
        if masks and sum(map(len, masks)) < sum(map(len, groups)):
            raise ShardError("got detections with masks and others without; expected masks of all or of none")
        groups = [cls.empty(), *groups]  # so that there is always an array to concatenate
        return cls(
            np.concatenate([group.image_ids for group in groups]),
            np.concatenate([group.labels for group in groups]),
            np.concatenate([group.scores for group in groups]),
            np.concatenate([group.boxes_xywh for group in groups]),
            np.concatenate(masks) if masks else None,
        )
