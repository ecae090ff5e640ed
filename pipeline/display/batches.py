"""A global batch as the model sees it: a picture of all its images and a table with a digest of each rank's share."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from detr.batch import Batch, normalise
from detr.config import TransformConfig
from pipeline.display.draw import Boxes, contact_sheet, draw, font

_DRAWN, _TILE, _BAR = 320, 328, 18  # pixels
_COLUMNS, _MOST_COLUMNS = 8, 16


class BatchView:
    """View of a global batch, filled with the micro-batches of one rank after the other."""

    def __init__(self, transform: TransformConfig, names: Sequence[str]) -> None:
        self._transform, self._names = transform, names
        self._tiles: list[Image.Image] = []
        self.columns: dict[str, list[Any]] = {
            name: [] for name in ("rank", "pass", "images", "boxes", "canvas", "padding", "sha256", "image_ids")
        }
        """A row per forward pass of each rank."""

    def add_all(self, ranks: Iterable[tuple[Batch, ...]], stopped: Callable[[], bool] = lambda: False) -> bool:
        """Add the micro-batches of all ranks in turn; return False if `stopped` told to leave the rest out."""
        for rank, batches in enumerate(ranks):
            for number, batch in enumerate(batches):
                self._add_row(rank, number, batch)
                for image in range(len(batch)):
                    if stopped():
                        return False
                    place = f"rank {rank}" + (f", pass {number}" if len(batches) > 1 else "")
                    self._tiles.append(self._tile(batch, image, place))
        return True

    def picture(self) -> Image.Image:
        """Return all images in one picture, in the order of the ranks."""
        columns = max(1, min(math.ceil(math.sqrt(len(self._tiles))), _COLUMNS))
        if len(self._tiles) > _COLUMNS**2:
            columns = min(math.ceil(math.sqrt(len(self._tiles))), _MOST_COLUMNS)
        return contact_sheet(self._tiles, columns, min(columns, _COLUMNS) * _TILE)

    def _add_row(self, rank: int, number: int, batch: Batch) -> None:
        height, width = batch.images.shape[-2:]
        padded = 0.0 if batch.padding is None else float(batch.padding.float().mean())
        row = (
            rank,
            number,
            len(batch),
            sum(len(target.labels) for target in batch.targets),
            f"{height} x {width}",
            round(padded, 4),
            batch_digest(batch),
            ", ".join(str(target.image_id) for target in batch.targets),
        )
        for name, value in zip(self.columns, row, strict=True):
            self.columns[name].append(value)

    def _tile(self, batch: Batch, number: int, place: str) -> Image.Image:
        """Return an image on its canvas after normalisation, which is undone for the eye, with its boxes."""
        one = slice(number, number + 1)
        padding = None if batch.padding is None else batch.padding[one]
        normalised = normalise(Batch(batch.images[one], padding, batch.targets[one]), self._transform)[0]
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self._transform.mean, self._transform.std))
        pixels = ((normalised * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
        canvas = Image.fromarray(pixels)
        target, size = batch.targets[number], batch.sizes[number]
        factor = _DRAWN / max(canvas.size)
        shrunk = (max(1, round(canvas.width * factor)), max(1, round(canvas.height * factor)))
        cxcywh = target.boxes.numpy().astype(np.float64) * np.array([size[1], size[0]] * 2)
        corners = np.concatenate([cxcywh[:, :2] - cxcywh[:, 2:] / 2, cxcywh[:, :2] + cxcywh[:, 2:] / 2], axis=1)
        labels = target.labels.tolist()
        masks = None
        if target.masks is not None:
            whole = np.zeros((len(labels), canvas.height, canvas.width), np.bool_)
            whole[:, : size[0], : size[1]] = target.masks.numpy()
            masks = np.stack([np.asarray(Image.fromarray(mask).resize(shrunk)) for mask in whole]) if labels else None
        boxes = Boxes(corners * factor, labels, [self._names[label] for label in labels], masks=masks)
        drawn = draw(canvas.resize(shrunk, Image.Resampling.BILINEAR), boxes)
        tile = Image.new("RGB", (_TILE, drawn.height + _BAR), "white")
        tile.paste(drawn, (0, _BAR))
        text = f"{place}: image {target.image_id}, {size[0]} x {size[1]} on {canvas.height} x {canvas.width}"
        ImageDraw.Draw(tile).text((3, 1), text, fill="black", font=font(12))
        return tile


def batch_digest(batch: Batch) -> str:
    """Return the SHA-256 of everything that a batch gives to a step: pixels, padding, boxes, labels, masks."""
    digest = hashlib.sha256(repr(tuple(batch.images.shape)).encode())
    tensors = [batch.images, *([] if batch.padding is None else [batch.padding])]
    for target in batch.targets:
        tensors += [target.boxes, target.labels, *([] if target.masks is None else [target.masks])]
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
