"""Detections with the cells, or points, of the image that their queries have read in the last decoder layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from detr.batch import Target, collate, normalise
from detr.config import TransformConfig
from detr.geometry import eval_geometry
from detr.postprocess import detect, detecting_queries
from detr.transforms import apply
from detr.variant import DETR
from pipeline.evaluation.cross_attention import CellWeights, attend_with
from shards.arrays import Floats


@dataclass(frozen=True, eq=False)
class Attended:
    """Detection in an image, and the attention of its query: of cells or, in Deformable DETR, of points."""

    label: int
    """Class, by the model's labels."""
    score: float
    box_xyxy: Floats
    """Corners in pixels of the image."""
    cells: Floats | None
    """Weights of the cells of a map over the image, [h, w]; their sum is 1."""
    points: Floats | None
    """Points that are read, [P, 3]: x and y as fractions of the image, and the weight; their sum is 1."""


def attended_detections(
    model: DETR, image: npt.NDArray[np.uint8], transform: TransformConfig, threshold: float = 0.5, most: int = 6
) -> list[Attended]:
    """Return up to `most` detections of an RGB image of at least this score, the highest score first.

    The image is evaluated alone, without padding, so that the canvas of the attention is the image.
    """
    height, width = image.shape[:2]
    geometry = eval_geometry(width, height, transform)
    pixels, boxes, labels = apply(image, np.zeros((0, 4)), np.zeros(0, np.int64), geometry)
    device = next(model.parameters()).device
    batch = collate([(pixels, Target(boxes, labels, 0, (height, width)))]).to(device)
    training = model.training
    model.eval()
    try:
        outputs, attention = attend_with(model, normalise(batch, transform), batch.padding)
    finally:
        model.train(training)
    (found,), (queries,) = detect(outputs, [(height, width)]), detecting_queries(outputs)
    order = torch.argsort(found.scores, descending=True, stable=True)[:most].tolist()
    attended = []
    for number in order:
        query, score = int(queries[number]), float(found.scores[number])
        if score < threshold:
            break
        cells = points = None
        if isinstance(attention, CellWeights):
            cells = attention.weights[0, query].double().cpu().numpy()
        else:
            parts = attention.locations[0, query], attention.weights[0, query, :, None]
            points = torch.cat(parts, -1).double().cpu().numpy()
        box = found.boxes_xyxy[number].double().cpu().numpy()
        attended.append(Attended(int(found.labels[number]), score, box, cells, points))
    return attended
