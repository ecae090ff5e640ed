"""Where `shards` and `detr` meet: what the reader delivers becomes what the model takes.

The reader calls these in its threads. Boxes arrive as in the COCO JSON; `detr.transforms.apply` clamps them to the
image and drops those without area, as the original does. Crowds have been left out by the reader.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from torch import Tensor

from detr.batch import Target
from detr.config import TransformConfig
from detr.transforms import Geometry, apply, draw_geometry, eval_geometry
from shards.manifest import Index, Ints
from shards.read import Sample

Transform = Callable[[Sample], tuple[Tensor, Target]]


def training_transform(seed: int, config: TransformConfig) -> Transform:
    """Augment each sample by its (seed, epoch, image id), so by nothing that depends on the workers."""

    def transform(sample: Sample) -> tuple[Tensor, Target]:
        geometry = draw_geometry(seed, sample.epoch, sample.image_id, sample.width, sample.height, config)
        return _apply(sample, geometry)

    return transform


def evaluation_transform(config: TransformConfig) -> Transform:
    """One resize, nothing random."""

    def transform(sample: Sample) -> tuple[Tensor, Target]:
        return _apply(sample, eval_geometry(sample.width, sample.height, config))

    return transform


def sort_by_size(index: Index, seed: int, config: TransformConfig) -> Callable[[Ints, Ints], npt.NDArray[np.generic]]:
    """Sort keys for `plan_epoch`: the augmented aspect ratio, known before a byte is read.

    A rank's slice of a step then holds images of like shape: padding falls from about a third of the pixels to a
    tenth, and which images a step holds does not change.
    """
    images = index.images

    def keys(rows: Ints, epochs: Ints) -> npt.NDArray[np.generic]:
        sizes = [
            draw_geometry(seed, epoch, int(image["image_id"]), int(image["width"]), int(image["height"]), config).size
            for epoch, image in zip(epochs.tolist(), images[rows], strict=True)
        ]
        return np.array([width / height for height, width in sizes])

    return keys


def _apply(sample: Sample, geometry: Geometry) -> tuple[Tensor, Target]:
    image, boxes, labels = apply(sample.image, sample.boxes_xyxy, sample.labels, geometry)
    return image, Target(boxes, labels, sample.image_id, (sample.height, sample.width))
