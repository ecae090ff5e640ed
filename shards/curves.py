"""Precision over recall: what AP, AP50 and AP75 are the means of, as pycocotools computes it for them in any case."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# [10 IoU thresholds, 101 recalls, categories, area ranges, detections per image]; -1 where there is no truth.
Precision = npt.NDArray[np.float64]
RECALLS = tuple(np.linspace(0, 1, 101).tolist())
_IOU_50, _IOU_75 = 0, 5  # of 0.5, 0.55, ..., 0.95


@dataclass(frozen=True)
class Curves:
    """Precision in 0..1 at each of RECALLS, over all areas and up to 100 detections per image.

    Each is the mean over the classes of which there is truth, and -1 throughout where there is none of any: so the mean
    of ``precision`` (IoU 0.50:0.95) is AP, that of ``precision50`` AP50 and that of ``precision75`` AP75.
    """

    precision: tuple[float, ...]
    precision50: tuple[float, ...]
    precision75: tuple[float, ...]


UNSCORED = Curves(*[(-1.0,) * len(RECALLS)] * 3)
"""What is known before anything is scored."""


def mean_curves(precision: Precision) -> Curves:
    """The curves in what pycocotools' `accumulate` gives."""
    values = precision[:, :, :, 0, -1]
    scored = values[:, :, values[0, 0] > -1]  # a class without truth is -1 throughout
    if not scored.size:
        return UNSCORED
    means = scored.mean(axis=2)
    return Curves(*(tuple(one.tolist()) for one in (means.mean(axis=0), means[_IOU_50], means[_IOU_75])))
