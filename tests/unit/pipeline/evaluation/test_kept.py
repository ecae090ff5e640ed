"""Detections in the file of an evaluation."""

import logging
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load, save

from pipeline.errors import RegistryError
from pipeline.evaluation.evaluate_model import Evaluation
from pipeline.evaluation.kept import KEPT_NAME, from_bytes, keep, keep_beside, read_beside, to_bytes
from shards.score.coco_eval import score_detections
from shards.score.detections import Detections
from shards.score.panoptic_quality import quality_of
from tests.support.labelled import labelled, learned_by_heart
from tests.support.panoptic_counts import THINGS, drawn_counts, panoptic_grid, scored

COLUMNS = ("image_ids", "labels", "scores", "boxes_xywh")


@pytest.fixture
def data():
    return labelled([[(image % 3, 20.0, 20.0, 70.0, 50.0)] for image in range(6)])


def as_from_a_model(found):
    """Return the detections with boxes made from corners in single precision."""
    corners = (found.boxes_xywh * [1, 1, 0, 0] + found.boxes_xywh).astype(np.float32).astype(np.float64)
    return replace(found, boxes_xywh=np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1))


def evaluation(data, found):
    return Evaluation(score_detections(data, found), found, np.arange(data.images))


@pytest.mark.parametrize("change", [as_from_a_model, lambda found: found], ids=["corners", "boxes"])
def test_what_is_read_is_what_was_found_to_the_last_bit(data, change):
    found = change(learned_by_heart(data))
    kept = from_bytes(to_bytes(keep(data, evaluation(data, found))), "file")
    expected = found.take(np.argsort(found.image_ids, kind="stable"))
    for name in COLUMNS:
        column = getattr(kept.detections, name)
        assert np.array_equal(column, getattr(expected, name))
        assert column.dtype == getattr(expected, name).dtype
    assert (kept.digest, kept.data) == (data.digest, data.url)
    assert kept.image_ids.tolist() == sorted(data.index().images["image_id"].tolist())
    assert score_detections(data, kept.detections).metrics == score_detections(data, found).metrics


@pytest.mark.parametrize("found", [0.8, 0.0])
def test_outcomes_of_segments_are_kept_to_the_last_bit(found):
    data, images = panoptic_grid(30), drawn_counts(30, found, 1)
    images[0] = type(images[0])(*(column[:0] for column in vars(images[0]).values()))  # without any
    evaluated = scored(data, learned_by_heart(data), images)
    kept = from_bytes(to_bytes(keep(data, evaluated)), "file")
    assert kept.figure == "PQ"
    for name, column in vars(evaluated.panoptic.counts).items():
        read = getattr(kept.segments, name)
        assert np.array_equal(read, column), name
        assert read.dtype == column.dtype, name
    assert quality_of(kept.segments, THINGS) == evaluated.panoptic.quality


def test_a_file_of_an_earlier_release_has_no_segments(data):
    columns = load(to_bytes(keep(data, evaluation(data, learned_by_heart(data)))))
    kept = from_bytes(save(columns, {"format": "1", "digest": "d", "data": "u"}), "file")
    assert (kept.segments, kept.figure) == (None, "")


def test_images_without_a_detection_are_kept(data):
    kept = from_bytes(to_bytes(keep(data, evaluation(data, Detections.empty()))), "file")
    assert len(kept.image_ids) == 6
    assert len(kept.detections) == 0


def test_a_detection_of_a_model_takes_twenty_one_bytes(data):
    found = as_from_a_model(learned_by_heart(data))
    more = Detections.concatenate([found] * 11)
    sizes = [len(to_bytes(keep(data, evaluation(data, which)))) for which in (found, more)]
    assert sizes[1] - sizes[0] == pytest.approx(10 * len(found) * 21, rel=0.01)


def test_masks_are_not_kept(data):
    found = learned_by_heart(data)
    masks = np.empty(len(found), object)
    masks[:] = [b"0"] * len(found)
    scored = Evaluation(score_detections(data, found), replace(found, masks=masks), np.arange(data.images))
    assert keep(data, scored).detections.masks is None


@pytest.mark.parametrize("content", [b"", b"{}", b"\x10" + bytes(40)])
def test_a_damaged_file_is_refused_in_one_line(content):
    with pytest.raises(RegistryError, match=r"x.safetensors cannot be used.*expected detections kept by"):
        from_bytes(content, "x.safetensors")


def test_columns_that_disagree_are_refused(data):
    content = to_bytes(keep(data, evaluation(data, learned_by_heart(data))))
    columns = load(content)
    columns["counts"] = columns["counts"] + 1
    with pytest.raises(RegistryError, match="cannot be used"):
        from_bytes(save(columns, {"format": "1", "digest": "d", "data": "u"}), "x.safetensors")


def test_segments_of_more_images_than_there_are_are_refused():
    data = panoptic_grid(3)
    columns = load(to_bytes(keep(data, scored(data, learned_by_heart(data), drawn_counts(3, 0.8, 1)))))
    columns["segment_counts"] = columns["segment_counts"] + 1
    with pytest.raises(RegistryError, match="columns of segments of different lengths"):
        from_bytes(save(columns, {"format": "1", "digest": "d", "data": "u"}), "x.safetensors")


def test_detections_lie_beside_their_checkpoint(data, tmp_path):
    assert read_beside(tmp_path) is None
    keep_beside(tmp_path, data, evaluation(data, learned_by_heart(data)))
    assert (tmp_path / KEPT_NAME).exists()
    assert read_beside(tmp_path).digest == data.digest


def test_detections_that_cannot_be_written_end_no_run(data, tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        keep_beside(tmp_path / "file", data, evaluation(data, learned_by_heart(data)))
    assert "are not kept" in caplog.text
