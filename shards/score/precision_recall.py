"""Precision-recall curves, taken from what pycocotools computes for AP, AP50 and AP75."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# [10 IoU thresholds, 101 recalls, categories, area ranges, detections per image]; -1 without ground truth.
Precision = npt.NDArray[np.float64]
RECALLS = tuple(np.linspace(0, 1, 101).tolist())
_IOU_50, _IOU_75 = 0, 5  # of 0.5, 0.55, ..., 0.95


@dataclass(frozen=True)
class Curves:
    """Precision in 0..1 at each of `RECALLS`, for all areas and up to 100 detections per image.

    Each value is the mean over the classes with ground truth, or -1 if there are none. So the mean of `precision`
    (IoU 0.50:0.95) is AP, that of `precision50` AP50 and that of `precision75` AP75.
    """

    precision: tuple[float, ...]
    precision50: tuple[float, ...]
    precision75: tuple[float, ...]


_NO_CURVE = (-1.0,) * len(RECALLS)
UNSCORED = Curves(_NO_CURVE, _NO_CURVE, _NO_CURVE)
"""Curves of a data set without ground truth or detections to score."""


def mean_curves(precision: Precision) -> Curves:
    """Return the mean curves of the precision that pycocotools' `accumulate` computed."""
    values = precision[:, :, :, 0, -1]
    scored = values[:, :, values[0, 0] > -1]  # all values of a class without ground truth are -1
    if not scored.size:
        return UNSCORED
    means = scored.mean(axis=2)
    return Curves(
        precision=tuple(means.mean(axis=0).tolist()),
        precision50=tuple(means[_IOU_50].tolist()),
        precision75=tuple(means[_IOU_75].tolist()),
    )
