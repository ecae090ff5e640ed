"""The built-in data set in panoptic form: its shapes, which are things, on stuff: sky, grass and water.

An image has one to three kinds of stuff, each with a texture of its own, and irregular borders between them. A strip
along a border and a dull corner are VOID. Files are in COCO's panoptic format. As in `shards.synthetic`, equal
arguments give equal bytes with the same Pillow.
"""

import functools
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from shards.arrays import Ints, Mask
from shards.panoptic.segment_png import VOID, SegmentIds, write_png
from shards.panoptic.segments import find_regions
from shards.splits import SplitToWrite, write_splits
from shards.store import storage
from shards.synthetic import CATEGORIES, JPEG_QUALITY, Draws, Floats, draw_shapes
from shards.workers import Progress

STUFF = ("sky", "grass", "water")
THING_IDS = tuple(range(1, len(CATEGORIES) + 1))
STUFF_IDS = (11, 12, 13)  # a gap, as COCO has it between things and stuff
LEAST_STUFF = 64  # pixels; less of it is VOID
_COLOURS = ((220, 60, 60), (60, 60, 220), (220, 180, 40), (160, 60, 200), (135, 190, 235), (70, 150, 60), (30, 90, 130))


@dataclass(frozen=True)
class PanopticSplit:
    """Paths of a split, as `write_panoptic` takes them: image folder, JSON file, folder of PNGs."""

    images: Path
    annotations: Path
    segments: Path


@dataclass(frozen=True)
class SyntheticPanoptic:
    """Both splits of a generated data set."""

    train: PanopticSplit
    val: PanopticSplit


def write_synthetic_panoptic(
    out_dir: str | os.PathLike[str],
    *,
    train: int = 4000,
    val: int = 200,
    size: int = 96,
    seed: int = 0,
    progress: Progress | None = None,
) -> SyntheticPanoptic:
    """Write `OUT/{train,val}/*.jpg`, `OUT/panoptic_{train,val}/*.png` and `OUT/annotations/panoptic_{train,val}.json`.

    Arguments and errors are those of `write_synthetic`.
    """
    write = functools.partial(_write_split, seed=seed)
    return SyntheticPanoptic(*write_splits(out_dir, train, val, size, progress, write))


def _write_split(wanted: SplitToWrite, seed: int) -> PanopticSplit:
    document = wanted.folder / "annotations" / f"panoptic_{wanted.name}.json"
    split = PanopticSplit(wanted.folder / wanted.name, document, wanted.folder / f"panoptic_{wanted.name}")
    for folder in (split.images, split.segments, split.annotations.parent):
        folder.mkdir(parents=True, exist_ok=True)
    size, images, annotations = wanted.size, list[dict[str, Any]](), list[dict[str, Any]]()
    for number in range(wanted.count):
        image_id = wanted.first_id + number
        name = f"{image_id:012d}"
        pixels, ids, category_ids = _picture(Draws(seed, wanted.number, number), size)
        Image.fromarray(pixels).save(split.images / f"{name}.jpg", quality=JPEG_QUALITY)
        (split.segments / f"{name}.png").write_bytes(write_png(ids))
        images.append({"id": image_id, "file_name": f"{name}.jpg", "width": size, "height": size})
        segments = _segments_info(ids, category_ids)
        annotations.append({"image_id": image_id, "file_name": f"{name}.png", "segments_info": segments})
        wanted.done(number + 1)
    info = {"description": "Synthetic shapes on stuff for trying out panoptic segmentation", "version": "1"}
    content = {"info": info, "images": images, "annotations": annotations, "categories": _categories()}
    storage.write_atomic(split.annotations, msgspec.json.encode(content))
    return split


def _categories() -> list[dict[str, Any]]:
    listed = [(number, name, 1) for number, name in zip(THING_IDS, CATEGORIES, strict=True)]
    listed += [(number, name, 0) for number, name in zip(STUFF_IDS, STUFF, strict=True)]
    return [
        {
            "id": number,
            "name": name,
            "isthing": thing,
            "supercategory": "shape" if thing else "texture",
            "color": colour,
        }
        for (number, name, thing), colour in zip(listed, _COLOURS, strict=True)
    ]


def _segments_info(ids: SegmentIds, category_ids: dict[int, int]) -> list[dict[str, Any]]:
    regions = find_regions(ids)
    return [
        {
            "id": number,
            "category_id": category_ids[number],
            "iscrowd": 0,
            "bbox": [left, top, right - left + 1, bottom - top + 1],
            "area": area,
        }
        for number, area, (left, top, right, bottom) in zip(
            regions.ids.tolist(), regions.areas.tolist(), regions.corners.tolist(), strict=True
        )
        if number != VOID
    ]


def _picture(draws: Draws, size: int) -> tuple[npt.NDArray[np.uint8], SegmentIds, dict[int, int]]:
    """Return uint8 [size, size, 3], the segment of each pixel, uint32 [size, size], and the category of each segment."""
    stuff = _layout(draws, size)
    textures = np.stack([*(texture(draws, size) for texture in (_sky, _grass, _water)), _dull(draws, size)])
    canvas = np.take_along_axis(textures, stuff[None, :, :, None] % len(textures), axis=0)[0]
    objects = draw_shapes(draws, canvas)
    ids = np.zeros((size, size), np.uint32)
    category_ids = dict[int, int]()

    def add(category_id: int, pixels: Mask) -> None:
        number = 0
        while number in category_ids or number == VOID:
            number = sum(draws.integer(0, 255) << shift for shift in (0, 8, 16))
        ids[pixels] = number
        category_ids[number] = category_id

    covered = np.zeros((size, size), np.bool_)
    for label, visible in objects:
        add(THING_IDS[label], visible)
        covered |= visible
    for kind, category_id in enumerate(STUFF_IDS):
        pixels = (stuff == kind) & ~covered
        if pixels.sum() >= LEAST_STUFF:
            add(category_id, pixels)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8), ids, category_ids


def _layout(draws: Draws, size: int) -> Ints:
    """Return the kind of stuff of each pixel, int64 [size, size]; `len(STUFF)` is VOID."""
    count = draws.integer(1, len(STUFF))
    kinds = np.argsort(draws.array(len(STUFF)), kind="stable")[:count]
    rows, columns = np.mgrid[:size, :size].astype(np.float32)
    if draws.uniform() < 0.3:
        rows, columns = columns, rows
    bands = np.zeros((size, size), np.int64)
    void = np.zeros((size, size), np.bool_)
    for number in range(1, count):
        middle = size * (number + draws.uniform(-0.2, 0.2)) / count
        distance = rows - middle - _wave(draws, columns, size)
        bands += distance > 0
        void |= np.abs(distance) < draws.uniform(0, 2.5)
    if draws.uniform() < 0.4:
        corner = draws.uniform(0.25, 0.45) * size
        flip = slice(None, None, 1 if draws.uniform() < 0.5 else -1)
        void |= rows[flip] + columns + _wave(draws, columns, size) < corner
    return np.where(void, len(STUFF), kinds[np.minimum(bands, count - 1)])


def _wave(draws: Draws, along: Floats, size: int) -> Floats:
    """Return an irregular border: a slope and three sines of falling height."""
    border = (along - size / 2) * draws.uniform(-0.25, 0.25)
    for octave in range(3):
        period, phase = size / 2**octave * draws.uniform(0.7, 1.3), draws.uniform(0, 2 * math.pi)
        border = border + size * 0.06 / 2**octave * np.sin(along * (2 * math.pi / period) + phase)
    return np.asarray(border, np.float32)


def _sky(draws: Draws, size: int) -> Floats:
    """Return blue that turns pale downwards, with soft clouds."""
    top, bottom = np.array([90, 150, 225], np.float32), np.array([200, 225, 245], np.float32)
    shade = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
    coarse = Image.fromarray(draws.array(6, 6)).resize((size, size), Image.Resampling.BICUBIC)
    clouds = np.clip(np.asarray(coarse, np.float32) - 0.6, 0, 0.4)[:, :, None] * 160
    return np.asarray(top + (bottom - top) * shade + clouds + draws.uniform(-20, 15), np.float32)


def _grass(draws: Draws, size: int) -> Floats:
    """Return green of upright blades."""
    colour = np.array([70, 140, 50], np.float32) + (draws.array(3) - 0.5) * 50
    blades = np.repeat(draws.array(size // 4 + 1, size), 4, axis=0)[:size] - 0.5
    return np.asarray(colour + blades[:, :, None] * 80 + (draws.array(size, size, 1) - 0.5) * 40, np.float32)


def _water(draws: Draws, size: int) -> Floats:
    """Return dark blue with waves across."""
    colour = np.array([30, 85, 130], np.float32) + (draws.array(3) - 0.5) * 40
    rows, columns = np.mgrid[:size, :size].astype(np.float32)
    period, phase = draws.uniform(5, 9), draws.uniform(0, 2 * math.pi)
    waves = np.sin(rows * (2 * math.pi / period) + 1.5 * np.sin(columns * (2 * math.pi / (4 * period)) + phase))
    return np.asarray(colour + waves[:, :, None] * 28 + (draws.array(size, size, 1) - 0.5) * 16, np.float32)


def _dull(draws: Draws, size: int) -> Floats:
    """Return the grey noise below VOID."""
    return draws.uniform(70, 150) + (draws.array(size, size, 1) - 0.5) * np.full(3, 60, np.float32)
