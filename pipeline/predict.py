"""A registered detector in use: a folder with weights and a card in, detections out.

The card says everything that is needed to use the weights and where they came from. Neither needs code to be unpickled:
weights are safetensors, the card is JSON that is read strictly.
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
"""The name of a label that no category has: the original's labels are category ids, which have gaps."""


class Card(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a set of weights is: how to build and feed the model, what its labels mean, where it came from.

    What was imported from a file has the run that recorded the import, and empty values where training would stand.
    """

    format: int = FORMAT
    model: ModelConfig
    transform: TransformConfig
    categories: tuple[Category, ...]
    evaluate_batch_size: int
    evaluate_batching: Batching = "padded"
    """Cards of before there was a choice do not say it, and were evaluated so."""
    channels_last: bool = False
    """The memory layout it was evaluated in: another sums in another order."""
    ema: float = 0.0
    """Above 0: the weights are averages over the training's steps, of this decay (`optim.ema`)."""
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
    """Name and SHA-256 of the file that the weights were imported from; empty for what was trained here."""


def write_folder(folder: Path, model: DETR, card: Card) -> None:
    """Write weights, under the original's names, and card."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in to_original_state_dict(model).items()}
    save_file(weights, folder / WEIGHTS_NAME)
    (folder / CARD_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(card), indent=2))


def read_card(folder: Path) -> Card:
    """Read a card strictly; raises `RegistryError` naming what is wrong."""
    try:
        return msgspec.json.decode((folder / CARD_NAME).read_bytes(), type=Card)
    except (OSError, msgspec.DecodeError) as error:
        raise RegistryError(
            f"{folder / CARD_NAME} cannot be used ({error}); expected a model registered by `detr`"
        ) from None


def read_model(folder: Path) -> tuple[DETR, Card]:
    """The model, in evaluation mode on the CPU, and its card."""
    card = read_card(folder)
    model = build_model(card.model, len(card.categories))
    load_original_state_dict(model, load_file(folder / WEIGHTS_NAME))
    if card.channels_last:
        set_channels_last(model)
    return model.eval(), card


@dataclass(frozen=True)
class Found:
    """One detection: its category, score in 0..1, and box in pixels of the image, x and y of the corners.

    segmentation: where a model with masks sees it, in COCO's run lengths, `{"size": [height, width], "counts": str}`.
    """

    category_id: int
    name: str
    label: int
    score: float
    box_xyxy: tuple[float, float, float, float]
    segmentation: dict[str, Any] | None = None


class Detector:
    """Detects on PIL images. Thread-safe: it holds no state but the model."""

    def __init__(self, folder: Path, device: str | torch.device = "cpu") -> None:
        model, self.card = read_model(folder)
        self._device = torch.device(device)
        self._model = model.to(self._device)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], threshold: float = 0.5) -> list[list[Found]]:
        """Detections of each image with at least this score, the surest first. Each image runs by itself, unpadded."""
        return [self._one(image, threshold) for image in images]

    def _one(self, image: Image.Image, threshold: float) -> list[Found]:
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
    """Detections in COCO's result format, with the original category ids, boxes xywh in pixels, masks if there are."""
    return [
        {
            "image_id": image_id,
            "category_id": one.category_id,
            "category": one.name,
            "bbox": [
                one.box_xyxy[0],
                one.box_xyxy[1],
                one.box_xyxy[2] - one.box_xyxy[0],
                one.box_xyxy[3] - one.box_xyxy[1],
            ],
            "score": one.score,
            **({} if one.segmentation is None else {"segmentation": one.segmentation}),
        }
        for one in found
    ]
