"""Detections of many images as columns: what a model found, to be scored, drawn or written out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shards.errors import ShardError
from shards.index import Ints


@dataclass(frozen=True, eq=False)
class Detections:
    """Detections of many images as columns, in any order; equal scores in one image rank in the order given.

    Attributes:
        image_ids: int64 [M], original image ids.
        labels: int64 [M], labels of the manifest (0..K-1).
        scores: float32 [M].
        boxes_xywh: float64 [M, 4], pixels of the original image.
        masks: object [M] of bytes, run lengths of masks at the original image's size, as ``encode_masks`` gives them;
            None where none were predicted.
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
        """Those at ``chosen`` (positions, or true where chosen), in that order."""
        return Detections(
            self.image_ids[chosen],
            self.labels[chosen],
            self.scores[chosen],
            self.boxes_xywh[chosen],
            None if self.masks is None else self.masks[chosen],
        )

    @classmethod
    def empty(cls, masks: bool = False) -> "Detections":
        """No detections, of a model with masks or without."""
        nothing, runs = np.zeros(0, np.int64), np.empty(0, np.object_) if masks else None
        return cls(nothing, nothing, np.zeros(0, np.float32), np.zeros((0, 4), np.float64), runs)

    @classmethod
    def concatenate(cls, parts: Sequence["Detections"]) -> "Detections":
        """All detections of ``parts``, in that order; none where there are no parts. Masks: of all parts, or of none."""
        masks = [part.masks for part in parts if part.masks is not None]
        if masks and sum(map(len, masks)) < sum(map(len, parts)):
            raise ShardError("got detections with masks and others without; expected masks of all or of none")
        parts = [cls.empty(), *parts]
        return cls(
            np.concatenate([part.image_ids for part in parts]),
            np.concatenate([part.labels for part in parts]),
            np.concatenate([part.scores for part in parts]),
            np.concatenate([part.boxes_xywh for part in parts]),
            np.concatenate(masks) if masks else None,
        )
