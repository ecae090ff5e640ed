"""PQ inside an evaluation, by a model that predicts the truth of a small panoptic data set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from detr.panoptic import PanopticResult, Segment
from pipeline.distributed.ranks import Ranks
from pipeline.evaluation.evaluate_model import Evaluation, evaluate_model
from pipeline.evaluation.panoptic import PanopticCounter, known_segments
from shards.dataset.categories import Category
from shards.dataset.manifest import Manifest
from shards.panoptic.segment_png import read_ids
from tests.support.oracle import OPTIONS, TRANSFORM, Oracle
from tests.support.panoptic_data import make_panoptic

WHOLE = replace(OPTIONS, transform=replace(TRANSFORM, eval_size=20, max_size=30), pictures=2)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_panoptic(tmp_path_factory.mktemp("panoptic")).write()


def evaluated(manifest: Manifest, categories: tuple[Category, ...] = (), *, masks: bool = True) -> Evaluation:
    categories = categories or manifest.categories
    found = evaluate_model(Oracle(manifest, categories, masks), manifest, categories, WHOLE)
    assert found is not None
    return found


def test_the_truth_has_a_quality_of_1_but_for_a_segment_of_a_pixel(manifest: Manifest) -> None:
    found = evaluated(manifest)
    assert found.panoptic is not None
    classes = {manifest.categories[entry.label].name: entry for entry in found.panoptic.quality.classes}
    assert {name: (entry.matched, entry.missed, entry.false) for name, entry in classes.items()} == {
        "person": (1, 0, 0),  # the other one is a crowd, on which a prediction is neither right nor wrong
        "car": (1, 1, 0),  # segments of 4 pixels or fewer are dropped
        "grass": (1, 0, 0),
        "sky": (2, 0, 0),
    }
    metrics = found.score.metrics
    # Sky gets the pixel of the dropped segment.
    assert metrics["PQ"] == pytest.approx((3 + 2 / 3) / 4, abs=1e-3)
    assert metrics["PQ_things"] == pytest.approx((1 + 2 / 3) / 2)
    assert (metrics["PQ_stuff"], metrics["SQ"]) == pytest.approx((1, 1), abs=2e-3)
    assert metrics["RQ_stuff"] == 1


def test_boxes_are_scored_of_things_only_and_without_masks(manifest: Manifest) -> None:
    found = evaluated(manifest)
    assert found.detections.masks is None
    assert "mask_AP" not in found.score.metrics
    scored = {entry.name: (entry.ap, entry.boxes) for entry in found.score.classes}
    assert scored["sky"] == scored["grass"] == (-1.0, 0)
    assert (scored["car"][1], scored["person"][1]) == (2, 1)
    assert found.score.metrics["AP"] >= 0


def test_a_model_without_masks_has_ap_and_no_pq(manifest: Manifest) -> None:
    found = evaluated(manifest, masks=False)
    assert found.panoptic is None
    assert "PQ" not in found.score.metrics
    assert "AP" in found.score.metrics


def test_classes_are_matched_by_category_id(manifest: Manifest) -> None:
    other = Category(77, "other", True)
    found = evaluated(manifest, (other, *reversed(manifest.categories)))
    assert found.panoptic is not None
    expected = evaluated(manifest).panoptic
    assert expected is not None
    assert found.panoptic.quality == expected.quality


def test_segments_of_classes_that_the_data_lacks_are_no_prediction() -> None:
    indices = torch.tensor([[0, 1, 2, 2], [0, 1, 1, 2]], dtype=torch.int32)
    segments = tuple(Segment(label, 0.9, 3, label) for label in (3, 0, 2))
    found, labels = known_segments(PanopticResult(indices, segments), np.array([-1, 5, 6, 7]))
    assert found.tolist() == [[0, -1, 1, 1], [0, -1, -1, 1]]
    assert labels == [7, 6]
    nothing, none = known_segments(PanopticResult(torch.full((1, 2), -1, dtype=torch.int32), ()), np.array([0]))
    assert (nothing.tolist(), none) == ([[-1, -1]], [])


def test_segments_of_the_images_to_draw_are_kept_as_pngs(manifest: Manifest) -> None:
    found = evaluated(manifest)
    assert found.panoptic is not None
    assert sorted(found.panoptic.drawn) == [3, 7]  # the lowest ids
    png, labels = found.panoptic.drawn[3]
    ids = read_ids(png)
    assert sorted(np.unique(ids).tolist()) == [number + 1 for number in range(len(labels))]
    assert manifest.categories[labels[ids[19, 29] - 1]].name == "grass"


def test_the_quality_does_not_depend_on_the_ranks(manifest: Manifest) -> None:
    """Ranks deliver in any order; sums must be the same to the last bit."""
    with PanopticCounter(manifest, np.arange(4), 1) as whole:
        found = evaluate_into(whole, manifest)
        parts = [(whole._counts[2:], {}), (whole._counts[:2], {})]
        ranks: Any = SimpleNamespace(first=True, all_gather=lambda own: parts)
        other = whole.gather(ranks)
        assert whole.gather(SimpleNamespace(first=False, all_gather=lambda own: parts)) is None  # type: ignore[arg-type]
    assert other is not None
    assert other.quality == found.quality
    assert other.metrics == found.metrics


def evaluate_into(counter: PanopticCounter, manifest: Manifest) -> Any:
    from pipeline.evaluation.evaluate_model import evaluate_readings

    oracle = Oracle(manifest, manifest.categories, masks=True)
    evaluate_readings(oracle, manifest, manifest.categories, (counter,), WHOLE)
    return counter.gather(Ranks())


def test_only_counts_are_kept_of_an_image(manifest: Manifest) -> None:
    with PanopticCounter(manifest, np.arange(4), 1) as counter:
        evaluate_into(counter, manifest)
        kept = [array for _, counted in counter._counts for array in vars(counted).values()]
        assert len(counter._counts) == 3
        assert max(np.asarray(array).size for array in kept) < 10
        assert counter._drawn == {}


def test_a_damaged_png_ends_the_evaluation_with_the_image_s_name(manifest: Manifest, tmp_path: Path) -> None:
    from shards.errors import BadSampleError

    with PanopticCounter(manifest, np.arange(4), 1) as counter:
        counter._reader.segments = lambda row: (_ for _ in ()).throw(BadSampleError("image 7: its PNG is damaged"))  # type: ignore[method-assign]
        with pytest.raises(BadSampleError, match="image 7"):
            evaluate_into(counter, manifest)


def test_stuff_is_merged_by_the_kinds_that_the_data_gives(manifest: Manifest) -> None:
    kinds = [category.isthing for category in manifest.categories]
    labels = np.array([-1, 3, 2, 1, 0])
    with PanopticCounter(manifest, labels, 1) as counter:
        assert counter._stuff == [False, *(not kind for kind in reversed(kinds))]
        assert any(counter._stuff)
