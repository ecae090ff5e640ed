"""The augmentation against the original's rules, restated here step by step, on the images of real COCO.

The rules: flip with p 0.5; then with p 0.5 resize the shorter side to one of 480, 512, ..., 800 with the longer at most
1333; else resize it to 400, 500 or 600, crop with both sides drawn in 384..600 (bounded by the image), and resize as
before. Boxes are clamped to the image and to the crop, and dropped without area.
"""

import json

import numpy as np
import pytest
from PIL import Image, ImageOps

from detr.config import TransformConfig
from detr.geometry import Geometry, draw_geometry
from detr.transforms import apply
from tests.support.real_data import COCO_TINY

pytestmark = pytest.mark.skipif(
    not COCO_TINY.is_dir(), reason=f"no COCO images at {COCO_TINY}; set DETR_COCO_TINY to a folder of them"
)
SCALES = [480 + 32 * number for number in range(11)]


@pytest.fixture(scope="module")
def examples():
    data = json.loads((COCO_TINY / "annotations" / "instances_train2017.json").read_bytes())
    boxes = {image["id"]: [] for image in data["images"]}
    for annotation in data["annotations"]:
        if not annotation["iscrowd"]:
            boxes[annotation["image_id"]].append(annotation["bbox"])
    return [(image, np.array(boxes[image["id"]], float).reshape(-1, 4)) for image in data["images"]]


def rule(size: tuple[int, int], shorter: int, longest: int | None = None) -> tuple[int, int]:
    """(width, height) -> (width, height), as the original rounds."""
    w, h = size
    if longest is not None and max(size) / min(size) * shorter > longest:
        shorter = round(longest * min(size) / max(size))
    if min(size) == shorter:
        return size
    return (shorter, int(shorter * h / w)) if w < h else (int(shorter * w / h), shorter)


def clamped(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    boxes = np.minimum(np.maximum(boxes, 0), [*size, *size])
    return boxes[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])]


def steps(geometry: Geometry, size: tuple[int, int], boxes_xywh: np.ndarray) -> tuple[tuple[int, int], np.ndarray]:
    """Follow the rules with what was drawn: the output's (width, height), and its boxes, cxcywh in fractions."""
    boxes = boxes_xywh.copy()
    boxes[:, 2:] += boxes[:, :2]
    boxes = clamped(boxes, size)
    if geometry.flip:
        boxes = np.stack([size[0] - boxes[:, 2], boxes[:, 1], size[0] - boxes[:, 0], boxes[:, 3]], 1)
    if (crop := geometry.crop) is not None:
        first = {rule(size, shorter): shorter for shorter in (400, 500, 600)}
        enlarged = crop.resized[::-1]
        assert enlarged in first
        boxes = boxes * ([enlarged[0] / size[0], enlarged[1] / size[1]] * 2)
        size = crop.size[::-1]
        for side, whole, start in zip(size, enlarged, (crop.left, crop.top), strict=True):
            assert min(384, whole) <= side <= min(600, whole)
            assert 0 <= start <= whole - side
        boxes = clamped(boxes - [crop.left, crop.top] * 2, size)
    possible = [rule(size, shorter, 1333) for shorter in SCALES]
    assert geometry.size[::-1] in possible
    boxes = boxes / [*size, *size]
    return geometry.size[::-1], np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)


def test_thousand_draws_have_the_originals_sizes_and_boxes(examples):
    config, crops, flips, seen = TransformConfig(), 0, 0, set()
    for number in range(1000):
        image, boxes = examples[number % len(examples)]
        size = image["width"], image["height"]
        geometry = draw_geometry(7, number // len(examples), image["id"], *size, config)
        expected_size, expected = steps(geometry, size, boxes)
        pixels = np.broadcast_to(np.uint8(0), (size[1], size[0], 3))
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
        got_pixels, got, labels = apply(pixels, corners, np.arange(len(boxes)), geometry)
        assert tuple(got_pixels.shape[1:]) == expected_size[::-1]
        assert len(got) == len(labels) == len(expected)
        np.testing.assert_allclose(got.numpy(), expected, atol=1e-5)
        crops, flips = crops + (geometry.crop is not None), flips + geometry.flip
        seen.add(min(geometry.size))
    assert 430 < crops < 570
    assert 430 < flips < 570
    assert set(SCALES) <= seen


@pytest.mark.parametrize("size", [(640, 200), (200, 640), (640, 201)])
def test_long_images_may_get_1334_pixels_as_in_the_original(size):
    config = TransformConfig(train_scales=(800,), crop=False)
    geometry = draw_geometry(0, 0, 1, *size, config)
    assert max(geometry.size) == 1334
    assert geometry.size[::-1] == rule(size, 800, 1333)


def test_pixels_are_within_two_levels_of_pil(examples):
    config, worst, resized_twice = TransformConfig(), 0, 0
    for image, _ in examples[:24]:
        with Image.open(COCO_TINY / "train2017" / image["file_name"]) as file:
            picture = file.convert("RGB")
        geometry = draw_geometry(3, 0, image["id"], *picture.size, config)
        got, _, _ = apply(np.array(picture), np.zeros((0, 4)), np.zeros(0), geometry)
        if geometry.flip:
            picture = ImageOps.mirror(picture)
        if (crop := geometry.crop) is not None:
            resized_twice += 1
            picture = picture.resize(crop.resized[::-1], Image.Resampling.BILINEAR)
            picture = picture.crop((crop.left, crop.top, crop.left + crop.size[1], crop.top + crop.size[0]))
        picture = picture.resize(geometry.size[::-1], Image.Resampling.BILINEAR)
        worst = max(worst, np.abs(got.permute(1, 2, 0).numpy().astype(int) - np.asarray(picture, int)).max())
    assert resized_twice > 5
    assert worst <= 2
