"""Detections with the attention of their queries."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from detr.config import DeformableConfig
from detr.model import build_model
from pipeline.config import RunConfig
from pipeline.display.attention import attention_picture
from pipeline.evaluation.attention import Attended, attended_detections


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (48, 72, 3)).astype(np.uint8)


def attended(config: RunConfig, image: np.ndarray, threshold: float = 0.0, most: int = 3) -> list[Attended]:
    torch.manual_seed(0)
    model = build_model(config.model, 4)
    with torch.no_grad():
        # First weights see every image alike; these do not.
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    found = attended_detections(model.train(), image, config.transform, threshold, most)
    assert model.training
    return found


def test_the_best_detections_have_the_cells_that_their_queries_read(tiny_config: RunConfig, image: np.ndarray) -> None:
    found = attended(tiny_config, image)
    assert len(found) == 3
    assert [detection.score for detection in found] == sorted((detection.score for detection in found), reverse=True)
    for detection in found:
        assert detection.points is None
        assert detection.cells is not None
        assert detection.cells.shape == (3, 4)  # of 43 x 64 pixels
        assert detection.cells.sum() == pytest.approx(1)
    assert not np.allclose(found[0].cells, found[1].cells)
    middle = found[1].score
    assert len(attended(tiny_config, image, threshold=middle)) == 2
    assert attended(tiny_config, image, threshold=1.1) == []


def test_detections_of_deformable_attention_have_points(tiny_config: RunConfig, image: np.ndarray) -> None:
    model = replace(tiny_config.model, variant="deformable", hidden_dim=32, deformable=DeformableConfig(levels=3))
    for detection in attended(replace(tiny_config, model=model), image):
        assert detection.cells is None
        assert detection.points is not None
        assert detection.points.shape == (2 * 3 * 4, 3)
        assert detection.points[:, 2].sum() == pytest.approx(1)


def test_the_attended_cells_are_lit_and_the_others_dimmed() -> None:
    cells = np.zeros((4, 4))
    cells[0, 3] = 1.0
    corner = Attended(1, 0.75, np.array([10.0, 60.0, 40.0, 90.0]), cells, None)
    picture = attention_picture(Image.new("RGB", (100, 100), (200, 200, 200)), [corner], ["a", "b"], "title", tile=400)
    assert picture.size == (800, 426)
    tile = np.asarray(picture, np.int64)[26:, 400:]
    assert tile[20, 380].sum() > 400
    assert tile[20, 20].sum() < 200
    assert tile[380, 380].sum() < 200


def test_points_are_drawn_where_they_are_read() -> None:
    points = np.array([[0.8, 0.2, 0.9], [0.2, 0.8, 0.1], [1.4, -0.3, 0.0]])
    found = Attended(0, 0.5, np.array([40.0, 40.0, 60.0, 60.0]), None, points)
    picture = attention_picture(Image.new("RGB", (100, 100), "black"), [found], ["a"], tile=400)
    tile = np.asarray(picture, np.int64)[:, 400:]
    assert tile[80, 320].sum() > 200
    assert tile[320, 80].sum() > 200
    assert tile[20:60, 20:60].sum() == 0
