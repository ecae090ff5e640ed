"""A registered detector: weights and card in, detections out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detr.batch import Target, collate, normalise
from detr.geometry import eval_geometry
from detr.panoptic import panoptic
from detr.postprocess import Detection, detect
from detr.transforms import apply
from pipeline.inference.segments import Segmented, segmented
from pipeline.registry.card import read_model
from shards.masks.rle import encode_masks
from shards.rgb import to_rgb


@dataclass(frozen=True)
class Prediction:
    """Detection in an image."""

    category_id: int
    name: str
    label: int
    score: float
    """Confidence, 0 to 1."""
    box_xyxy: tuple[float, float, float, float]
    """Corners of the box in pixels of the image."""
    segmentation: dict[str, Any] | None = None
    """Mask in COCO's run lengths, `{"size": [height, width], "counts": str}`; None for a model without masks."""


class Detector:
    """Detector for PIL images. Thread-safe: its only state is the model."""

    def __init__(self, folder: Path, device: str | torch.device = "cpu") -> None:
        model, self.card = read_model(folder)
        self._device = torch.device(device)
        self.model = model.to(self._device)

    def __call__(self, images: Sequence[Image.Image], threshold: float = 0.5) -> list[list[Prediction]]:
        """Return the detections of each image with a score of at least `threshold`, in descending order of score.

        Each image is processed alone, without padding. Of a panoptic model, only things are detections.
        """
        return [self.read(image, threshold)[0] for image in images]

    @torch.inference_mode()
    def read(self, image: Image.Image, threshold: float = 0.5) -> tuple[list[Prediction], Segmented | None]:
        """Return the detections of an image, and its segments if the model is panoptic."""
        pixels = np.asarray(to_rgb(image))
        height, width = pixels.shape[:2]
        geometry = eval_geometry(width, height, self.card.transform)
        tensor, boxes, labels = apply(pixels, np.zeros((0, 4)), np.zeros(0, dtype=np.int64), geometry)
        batch = collate([(tensor, Target(boxes, labels, 0, (height, width)))]).to(self._device)
        outputs = self.model(normalise(batch, self.card.transform), batch.padding)
        found = self._predictions(detect(outputs, [(height, width)], sizes=batch.sizes)[0], threshold)
        if not self.card.panoptic:
            return found, None
        stuff = [category.isthing is False for category in self.card.categories]
        result = panoptic(outputs, [(height, width)], batch.sizes, None, stuff)[0]
        return found, segmented(result, self.card.categories)

    def _predictions(self, detection: Detection, threshold: float) -> list[Prediction]:
        order = torch.argsort(detection.scores, descending=True, stable=True).tolist()
        found = []
        for number in order:
            score = float(detection.scores[number])
            if score >= threshold:
                label = int(detection.labels[number])
                category = self.card.categories[label]
                if category.isthing is False:
                    continue
                x0, y0, x1, y1 = (float(value) for value in detection.boxes_xyxy[number])
                mask = None if detection.masks is None else _run_lengths(detection.masks[number])
                found.append(Prediction(category.id, category.name, label, score, (x0, y0, x1, y1), mask))
        return found


def _run_lengths(mask: Tensor) -> dict[str, Any]:
    return {"size": list(mask.shape), "counts": encode_masks(mask[None].cpu().numpy())[0].decode()}


def coco_result(detection: Prediction) -> dict[str, Any]:
    """Return a detection in COCO's format without the image: original category id, box xywh in pixels, mask if any."""
    x0, y0, x1, y1 = detection.box_xyxy
    result: dict[str, Any] = {
        "category_id": detection.category_id,
        "category": detection.name,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "score": detection.score,
    }
    if detection.segmentation is not None:
        result["segmentation"] = detection.segmentation
    return result


def coco_results(image_id: int, found: Sequence[Prediction]) -> list[dict[str, Any]]:
    """Return the detections of an image in COCO's result format."""
    return [{"image_id": image_id, **coco_result(detection)} for detection in found]
