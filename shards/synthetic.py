"""The built-in data set: small images of circles, squares, triangles and crosses, as JPEG files and COCO JSON.

Each image has a background (noise, waves, or a crop of one of scikit-learn's two bundled photographs) and one to five
objects of 14 to 43 pixels, which may hide up to two fifths of one another. Boxes, areas and segmentations are those of
the visible pixels. Every number comes from a hash of (seed, split, image), so equal arguments give equal bytes with the
same Pillow.
"""

import colorsys
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

from shards.arrays import Mask
from shards.hashing import hashes
from shards.splits import SplitToWrite, write_splits
from shards.store import storage
from shards.workers import Progress

CATEGORIES = ("circle", "square", "triangle", "cross")
MIN_SIDE, MAX_SIDE = 14, 43  # pixels
MAX_OBJECTS = 5
MIN_VISIBLE = 0.6  # fraction of every object's pixels, whatever the number of objects above it
JPEG_QUALITY = 90

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Split:
    """Paths of a split, as `write_coco` takes them: image folder, JSON file."""

    images: Path
    annotations: Path


@dataclass(frozen=True)
class Synthetic:
    """Both splits of a generated data set."""

    train: Split
    val: Split


def write_synthetic(
    out_dir: str | os.PathLike[str],
    *,
    train: int = 4000,
    val: int = 200,
    size: int = 96,
    seed: int = 0,
    progress: Progress | None = None,
) -> Synthetic:
    """Write `OUT/{train,val}/*.jpg` and `OUT/annotations/instances_{train,val}.json`, and return their paths.

    Files of the same names in the local folder `out_dir` are replaced. `train` and `val` are numbers of images, `size`
    the side of the square images in pixels, at least 64, `seed` any integer. `progress` counts images.

    Raise `ShardError` when `size` or a number of images is too small, or the folder cannot be written.
    """
    return Synthetic(*write_splits(out_dir, train, val, size, progress, functools.partial(_write_split, seed=seed)))


class Draws:
    """A sequence of random numbers from a hash; unlike NumPy's generators, the same in every version."""

    def __init__(self, *key: int) -> None:
        self._seed, self._block, self._left = int(hashes(key, 0)[0]), 0, list[float]()

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        if not self._left:
            self._left = self.array(64).tolist()
        return low + (high - low) * self._left.pop()

    def integer(self, low: int, high: int) -> int:
        """Return an integer, low <= result <= high."""
        return low + int(self.uniform() * (high - low + 1))

    def array(self, *shape: int) -> Floats:
        """Return float32 numbers in 0..1."""
        self._block += 1
        count = math.prod(shape)
        words = hashes((self._seed, self._block), np.arange(math.ceil(count / 4)))  # of four numbers each
        numbers = words.view(np.uint16)[:count].astype(np.float32)
        return np.multiply(numbers, np.float32(1 / 65536)).reshape(shape)


def _write_split(wanted: SplitToWrite, seed: int) -> Split:
    split = Split(wanted.folder / wanted.name, wanted.folder / "annotations" / f"instances_{wanted.name}.json")
    split.images.mkdir(parents=True, exist_ok=True)
    split.annotations.parent.mkdir(parents=True, exist_ok=True)
    size, images, annotations = wanted.size, list[dict[str, Any]](), list[dict[str, Any]]()
    for number in range(wanted.count):
        image_id = wanted.first_id + number
        pixels, objects = _picture(Draws(seed, wanted.number, number), size)
        name = f"{image_id:012d}.jpg"
        Image.fromarray(pixels).save(split.images / name, quality=JPEG_QUALITY)
        images.append({"id": image_id, "file_name": name, "width": size, "height": size})
        for label, visible in objects:
            annotation = {"id": len(annotations) + 1, "image_id": image_id, "category_id": label + 1}
            annotations.append(annotation | _describe(visible))
        wanted.done(number + 1)
    categories = [{"id": label + 1, "name": name, "supercategory": "shape"} for label, name in enumerate(CATEGORIES)]
    info = {"description": "Synthetic shapes for trying out object detection", "version": "1"}
    content = {"info": info, "images": images, "annotations": annotations, "categories": categories}
    storage.write_atomic(split.annotations, msgspec.json.encode(content))
    return split


def _picture(draws: Draws, size: int) -> tuple[npt.NDArray[np.uint8], list[tuple[int, Mask]]]:
    """Return uint8 [size, size, 3], and each object's label and visible pixels, bool [size, size]."""
    canvas = _background(draws, size)
    objects = draw_shapes(draws, canvas)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8), objects


def draw_shapes(draws: Draws, canvas: Floats) -> list[tuple[int, Mask]]:
    """Draw shapes on a square canvas, float32 [size, size, 3]; return the label and visible pixels of each."""
    size = len(canvas)
    objects = list[tuple[int, Mask, int]]()  # label, visible pixels, number of pixels with nothing above
    wanted = draws.integer(1, MAX_OBJECTS)
    for _ in range(4 * wanted):  # some attempts hide too much of an earlier object and are dropped
        if len(objects) == wanted:
            break
        label = draws.integer(0, len(CATEGORIES) - 1)
        top, left, coverage = _place(draws, label, size)
        patch = (slice(top, top + coverage.shape[0]), slice(left, left + coverage.shape[1]))
        mask = np.zeros((size, size), bool)
        mask[patch] = coverage >= 0.5
        remaining = [visible & ~mask for _, visible, _ in objects]
        if any(visible.sum() < MIN_VISIBLE * full for visible, (_, _, full) in zip(remaining, objects, strict=True)):
            continue
        objects = [(earlier, visible, full) for visible, (earlier, _, full) in zip(remaining, objects, strict=True)]
        objects.append((label, mask, int(mask.sum())))
        colour = _colour(draws, canvas[patch].mean(axis=(0, 1)))
        grain = (draws.array(*coverage.shape, 1) - 0.5) * 24
        canvas[patch] += coverage[:, :, None] * (colour + grain - canvas[patch])
    return [(label, visible) for label, visible, _ in objects]


def _background(draws: Draws, size: int) -> Floats:
    """Return float32 [size, size, 3] in 0..255: noise, waves, or a crop of a photograph."""
    kind = draws.integer(0, 2)
    if kind == 0:
        base, strength = draws.array(3) * 160 + 48, draws.uniform(20, 90)
        return base + (draws.array(size, size, 3) - 0.5) * strength
    if kind == 1:
        first, second = draws.array(3) * 220 + 18, draws.array(3) * 220 + 18
        angle, period, bend = draws.uniform(0, math.pi), draws.uniform(5, 24), draws.uniform(0, 2)
        rows, columns = np.mgrid[:size, :size].astype(np.float32)
        along = rows * math.sin(angle) + columns * math.cos(angle)
        across = rows * math.cos(angle) - columns * math.sin(angle)
        wave = np.sin(along * (2 * math.pi / period) + bend * np.sin(across * (2 * math.pi / (3 * period))))
        mixed = first + (second - first) * ((0.5 + 0.3 * wave)[:, :, None])
        return np.asarray(mixed + (draws.array(size, size, 1) - 0.5) * 16, np.float32)
    photograph = _photographs()[draws.integer(0, 1)]
    side = draws.uniform(size, min(photograph.size))
    left, top = draws.uniform(0, photograph.width - side), draws.uniform(0, photograph.height - side)
    box = (left, top, left + side, top + side)
    crop = photograph.resize((size, size), Image.Resampling.BILINEAR, box, reducing_gap=1.5)
    return np.asarray(crop, np.float32).copy()


@functools.cache
def _photographs() -> tuple[Image.Image, Image.Image]:
    from sklearn.datasets import load_sample_image

    return (Image.fromarray(load_sample_image("china.jpg")), Image.fromarray(load_sample_image("flower.jpg")))


def _place(draws: Draws, label: int, size: int) -> tuple[int, int, Floats]:
    """Return top and left in pixels, and the covered fraction of each pixel, float32 [height, width] in 0..1."""
    longer = draws.integer(MIN_SIDE, MAX_SIDE)
    shorter = max(MIN_SIDE, round(longer * draws.uniform(0.75, 1.0)))
    height, width = (longer, shorter) if draws.uniform() < 0.5 else (shorter, longer)
    top, left = draws.integer(0, size - height), draws.integer(0, size - width)
    return top, left, _coverage(label, height, width)


@functools.lru_cache(maxsize=4096)
def _coverage(label: int, height: int, width: int) -> Floats:
    """Return a shape that touches all four sides of its box, antialiased from 4x4 points per pixel."""
    points = 4
    rows = (np.arange(height * points, dtype=np.float32)[:, None] + 0.5) / (height * points)  # 0 top, 1 bottom
    columns = (np.arange(width * points, dtype=np.float32)[None, :] + 0.5) / (width * points)
    x, y = np.abs(2 * columns - 1), np.abs(2 * rows - 1)  # 0 in the middle, 1 at the sides
    inside = (
        x**2 + y**2 <= 1,
        (x <= 1) & (y <= 1),
        x <= rows,
        (x <= 1 / 3) | (y <= 1 / 3),
    )[label]
    return np.asarray(inside.reshape(height, points, width, points).mean(axis=(1, 3)), np.float32)


def _colour(draws: Draws, behind: Floats) -> Floats:
    """Return a strong colour, float32 [3] in 0..255, that differs from the mean colour behind it."""
    for _ in range(16):
        hue, saturation, value = draws.uniform(), draws.uniform(0.5, 1.0), draws.uniform(0.35, 1.0)
        colour = np.array(colorsys.hsv_to_rgb(hue, saturation, value), np.float32) * 255
        if float(np.linalg.norm(colour - behind)) > 110:
            break
    return colour


def _describe(visible: Mask) -> dict[str, Any]:
    """Return box, area and segmentation (COCO's run lengths, column by column, starting with the background)."""
    rows, columns = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    flat = np.concatenate([[False], visible.ravel(order="F"), [False]])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(changes, prepend=0, append=visible.size).tolist()
    if counts[-1] == 0:
        counts.pop()
    return {
        "bbox": [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1],
        "area": int(visible.sum()),
        "iscrowd": 0,
        "segmentation": {"size": list(visible.shape), "counts": counts},
    }
