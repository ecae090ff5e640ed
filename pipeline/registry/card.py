"""Registered models on disk, and a detector that runs them on images.

A folder holds weights (safetensors) and a card (JSON, read strictly), so nothing is unpickled. The card describes how to use
the weights and where they came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from detr.batch import Target, collate, normalise
from detr.config import ModelConfig, TransformConfig
from detr.execution import set_channels_last
from detr.geometry import eval_geometry
from detr.model import DETR, build_model
from detr.original import load_original_state_dict, to_original_state_dict
from detr.postprocess import Detection, detect
from detr.transforms import apply
from pipeline.config import Batching
from pipeline.errors import RegistryError
from shards.images import to_rgb
from shards.manifest import Category
from shards.segmentation import encode_masks

WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "card.json"
FORMAT = 1
UNNAMED = "N/A"
"""Name of a label without a category: the original's labels are category ids, which have gaps."""


class Card(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Description of a set of weights: model, image transform, categories and origin.

    An imported model has the run that recorded the import, and empty values in the fields about training.
    """

    format: int = FORMAT
    model: ModelConfig
    transform: TransformConfig
    categories: tuple[Category, ...]
    evaluate_batch_size: int
    evaluate_batching: Batching = "padded"
    """Rule for evaluation batches. Cards of older versions lack it; those models were evaluated `padded`."""
    channels_last: bool = False
    """Memory layout of the evaluation; another one changes results by rounding."""
    ema: float = 0.0
    """Decay of the moving average that the weights are (`optim.ema`); 0: they are no average."""
    recipe: str
    run_id: str
    checkpoint: str
    step: int
    epoch: float
    metrics: dict[str, float]
    train_digest: str
    val_digest: str
    code_commit: str
    imported_from: str = ""
    """Name and SHA-256 of the file that the weights were imported from; empty if they were trained here."""


def write_folder(folder: Path, model: DETR, card: Card) -> None:
    """Write the weights, under the original's parameter names, and the card."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in to_original_state_dict(model).items()}
    save_file(weights, folder / WEIGHTS_NAME)
    (folder / CARD_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(card), indent=2))


def read_card(folder: Path) -> Card:
    """Read a card; raise `RegistryError` if it is missing, damaged or has unknown fields."""
    try:
        return msgspec.json.decode((folder / CARD_NAME).read_bytes(), type=Card)
    except (OSError, msgspec.DecodeError) as error:
        raise RegistryError(
            f"{folder / CARD_NAME} cannot be used ({error}); expected a model registered by `detr`"
        ) from None


def read_model(folder: Path) -> tuple[DETR, Card]:
    """Return the model, in evaluation mode on the CPU, and its card."""
    card = read_card(folder)
    model = build_model(card.model, len(card.categories))
    load_original_state_dict(model, load_file(folder / WEIGHTS_NAME))
    if card.channels_last:
        set_channels_last(model)
    return model.eval(), card


@dataclass(frozen=True)
class Found:
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
        self._model = model.to(self._device)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], threshold: float = 0.5) -> list[list[Found]]:
        """Return the detections of each image with a score of at least `threshold`, in descending order of score.

        Each image is processed alone, without padding.
        """
        return [self._detect(image, threshold) for image in images]

    def _detect(self, image: Image.Image, threshold: float) -> list[Found]:
        pixels = np.asarray(to_rgb(image))
        height, width = pixels.shape[:2]
        geometry = eval_geometry(width, height, self.card.transform)
        tensor, boxes, labels = apply(pixels, np.zeros((0, 4)), np.zeros(0, dtype=np.int64), geometry)
        batch = collate([(tensor, Target(boxes, labels, 0, (height, width)))]).to(self._device)
        outputs = self._model(normalise(batch, self.card.transform), batch.padding)
        return self._found(detect(outputs, [(height, width)], sizes=batch.sizes)[0], threshold)

    def _found(self, detection: Detection, threshold: float) -> list[Found]:
        order = torch.argsort(detection.scores, descending=True, stable=True).tolist()
        found = []
        for number in order:
            score = float(detection.scores[number])
            if score >= threshold:
                label = int(detection.labels[number])
                category = self.card.categories[label]
                x0, y0, x1, y1 = (float(value) for value in detection.boxes_xyxy[number])
                mask = None if detection.masks is None else _run_lengths(detection.masks[number])
                found.append(Found(category.id, category.name, label, score, (x0, y0, x1, y1), mask))
        return found


def _run_lengths(mask: Tensor) -> dict[str, Any]:
    return {"size": list(mask.shape), "counts": encode_masks(mask[None].cpu().numpy())[0].decode()}


def coco_results(image_id: int, found: Sequence[Found]) -> list[dict[str, Any]]:
    """Return detections in COCO's result format: original category ids, boxes xywh in pixels, masks if there are any."""
    results = []
    for detection in found:
        x0, y0, x1, y1 = detection.box_xyxy
        result: dict[str, Any] = {
            "image_id": image_id,
            "category_id": detection.category_id,
            "category": detection.name,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": detection.score,
        }
        if detection.segmentation is not None:
            result["segmentation"] = detection.segmentation
        results.append(result)
    return results
