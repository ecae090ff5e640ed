"""Segments of a picture in COCO's panoptic format, and in the answer of a served version."""

from __future__ import annotations

import base64
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from detr.panoptic import PanopticResult, Segment
from pipeline.inference.segments import Segmented, panoptic_document, segmented
from shards.dataset.categories import Category
from shards.masks.rle import decode_masks
from shards.panoptic.segment_png import read_ids
from tests.support.pictures import kinds

SKY, DOG = Category(200, "sky", False, (70, 130, 180)), Category(18, "dog", True)
INDICES = np.array([[0, 0, 0, 0], [0, 1, 1, 0]], np.int32)


def sky_and_dog() -> Segmented:
    segments = (Segment(1, 0.97, 6, 3), Segment(0, 0.9, 2, 5))
    return segmented(PanopticResult(torch.from_numpy(INDICES), segments), (DOG, SKY))


def test_segments_have_coco_s_ids_boxes_and_areas() -> None:
    found = sky_and_dog()
    assert found.infos == (
        {"id": 1, "category_id": 200, "isthing": 0, "iscrowd": 0, "area": 6, "bbox": [0, 0, 4, 2], "score": 0.97},
        {"id": 2, "category_id": 18, "isthing": 1, "iscrowd": 0, "area": 2, "bbox": [1, 1, 2, 1], "score": 0.9},
    )
    assert read_ids(found.png()).tolist() == (INDICES + 1).tolist()


def test_nothing_found_is_a_png_of_void() -> None:
    found = segmented(PanopticResult(torch.full((2, 4), -1, dtype=torch.int32), ()), (DOG, SKY))
    assert found.infos == ()
    assert read_ids(found.png()).tolist() == np.zeros((2, 4)).tolist()
    assert found.with_run_lengths((DOG, SKY)) == []


def test_the_json_names_pictures_and_categories() -> None:
    picture = {"image_id": 1, "file_name": "0001-a.png", "segments_info": [], "picture": "x/a.jpg"}
    document = panoptic_document([picture | {"height": 2, "width": 4}], (DOG, SKY))
    assert document["images"] == [{"id": 1, "file_name": "x/a.jpg", "height": 2, "width": 4}]
    assert document["annotations"] == [{"image_id": 1, "file_name": "0001-a.png", "segments_info": []}]
    assert document["categories"] == [
        {"id": 18, "name": "dog", "isthing": 1},
        {"id": 200, "name": "sky", "isthing": 0, "color": [70, 130, 180]},
    ]


def test_a_served_version_answers_with_run_lengths_and_a_png() -> None:
    with warnings.catch_warnings(record=True):  # MLflow advises type hints when the class is made
        from pipeline.inference.serve import DetrModel
    model: Any = DetrModel()
    card = SimpleNamespace(categories=(DOG, SKY))
    model._detector = SimpleNamespace(read=lambda picture, threshold: ([], sky_and_dog()), card=card)
    answer = model.predict(None, {"image": [kinds()[0].rows[0]]})[0]
    assert read_ids(base64.b64decode(answer["panoptic_png"])).tolist() == (INDICES + 1).tolist()
    assert [(segment["id"], segment["category"]) for segment in answer["segments"]] == [(1, "sky"), (2, "dog")]
    masks = decode_masks([segment["segmentation"] for segment in answer["segments"]], 2, 4)
    assert np.array_equal(masks, INDICES[None] == np.arange(2)[:, None, None])
