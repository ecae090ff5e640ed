"""Compare scores with those of pycocotools on the COCO JSON itself."""

import contextlib
import copy
import io
from dataclasses import replace

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from shards.errors import ShardError
from shards.score.coco_eval import MASK_METRICS, METRICS, Detections, coco_metrics, score_detections
from tests.support.coco_results import coco_results
from tests.support.detections import guesses, truth_itself, with_masks


def reference(path, manifest, detections, image_ids=None, kind="bbox"):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(coco_results(manifest, detections))), kind)
        if image_ids is not None:
            evaluation.params.imgIds = image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(METRICS, evaluation.stats.tolist(), strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_pycocotools_on_the_json(coco, seed):
    manifest = coco.write()
    detections = guesses(coco.data, manifest, seed)
    metrics = coco_metrics(manifest, detections)
    assert metrics == reference(coco.annotations, manifest, detections)
    assert 0 < metrics["AP50"] < 1


@pytest.mark.parametrize("ids", [(0, 1, 2), (1, 2, 3), (3, 7, 90), (90, 0, 5)], ids=str)
def test_labels_map_back_whatever_the_category_ids(coco, ids):
    new = dict(zip((3, 7, 90), ids, strict=True))
    for entry in coco.data["categories"]:
        entry["id"] = new[entry["id"]]
    for entry in coco.data["annotations"]:
        entry["category_id"] = new[entry["category_id"]]
    manifest = coco.write()
    detections = guesses(coco.data, manifest)
    assert coco_metrics(manifest, detections) == reference(coco.annotations, manifest, detections)
    assert {result["category_id"] for result in coco_results(manifest, detections)} == set(ids)
    names = {entry["id"]: entry["name"] for entry in coco.data["categories"]}
    assert [(score.category_id, score.name) for score in score_detections(manifest, detections).classes] == sorted(
        names.items()
    )


def test_an_annotation_with_id_0_counts(coco):
    # pycocotools itself takes a truth with id 0 for unmatched.
    coco.data["annotations"] = [
        annotation
        for annotation in coco.data["annotations"]
        if min(annotation["bbox"]) > 0 and not annotation["iscrowd"]
    ]
    for number, entry in enumerate(coco.data["annotations"]):
        entry["id"] = number
    manifest = coco.write()
    assert coco_metrics(manifest, truth_itself(manifest))["AP"] == pytest.approx(1)


def test_no_detections_score_zero_and_absent_sizes_minus_one(coco):
    manifest = coco.write()
    metrics = coco_metrics(manifest, Detections.empty())
    assert tuple(metrics) == METRICS
    assert metrics["AP"] == metrics["AR100"] == metrics["APs"] == 0
    assert metrics["APl"] == -1  # no box of the set is large
    assert [score.ap for score in score_detections(manifest, Detections.empty()).classes] == [0, 0, 0]


def test_a_category_without_boxes_scores_minus_one(coco):
    coco.data["categories"].append({"id": 91, "name": "unicorn"})
    manifest = coco.write()
    last = score_detections(manifest, guesses(coco.data, manifest)).classes[-1]
    assert (last.label, last.category_id, last.name, last.ap, last.ap50, last.boxes) == (3, 91, "unicorn", -1, -1, 0)


def test_the_mean_over_classes_is_the_ap(coco):
    manifest = coco.write()
    scored = score_detections(manifest, guesses(coco.data, manifest))
    assert np.mean([score.ap for score in scored.classes]) == pytest.approx(scored.metrics["AP"])
    assert np.mean([score.ap50 for score in scored.classes]) == pytest.approx(scored.metrics["AP50"])
    assert sum(score.boxes for score in scored.classes) == 8


def test_the_order_of_images_does_not_matter(coco):
    manifest = coco.write()
    found = guesses(coco.data, manifest)
    found = Detections(found.image_ids, found.labels, np.full(len(found), 0.5, np.float32), found.boxes_xywh)  # all tie
    order = np.argsort(-found.image_ids, kind="stable")
    other = Detections(found.image_ids[order], found.labels[order], found.scores[order], found.boxes_xywh[order])
    assert coco_metrics(manifest, other) == coco_metrics(manifest, found)


def test_a_subset_is_scored_as_if_it_were_the_data_set(coco):
    manifest = coco.write()
    wanted = [100, 128, 142]
    rows = manifest.index().rows_of(wanted)
    found = guesses(coco.data, manifest)
    with pytest.raises(ShardError, match="detections of images that are not scored, such as image 107"):
        coco_metrics(manifest, found, rows=rows)
    inside = np.isin(found.image_ids, wanted)
    part = Detections(found.image_ids[inside], found.labels[inside], found.scores[inside], found.boxes_xywh[inside])
    assert coco_metrics(manifest, part, rows=rows) == reference(coco.annotations, manifest, part, wanted)


def test_parts_are_concatenated_in_order(coco):
    manifest = coco.write()
    first, second = guesses(coco.data, manifest, 0), guesses(coco.data, manifest, 1)
    joined = Detections.concatenate([first, second])
    assert joined.scores.tolist() == first.scores.tolist() + second.scores.tolist()
    assert len(Detections.concatenate([])) == 0


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("image_ids", 5, "image id 5 is not in this data set"),
        ("labels", 90, "got label 90, expected 0 <= label < 3"),
        ("labels", -1, "got label -1"),
        ("scores", np.nan, "1 detections that are not finite, such as in image 107"),
        ("boxes_xywh", np.inf, "1 detections that are not finite, such as in image 107"),
    ],
)
def test_impossible_detections_are_refused(coco, column, value, message):
    manifest = coco.write()
    found = guesses(coco.data, manifest, per_box=1)
    getattr(found, column)[1] = value
    with pytest.raises(ShardError, match=message):
        coco_metrics(manifest, found)


def test_columns_of_different_lengths_are_refused():
    column = np.zeros(1, np.int64)
    with pytest.raises(ShardError, match="got detection columns of shapes"):
        Detections(column, column, np.zeros(2, np.float32), np.zeros((1, 4)))


def test_nothing_is_printed(coco, capfd):
    manifest = coco.write()
    coco_metrics(manifest, guesses(coco.data, manifest))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("seed", range(3))
def test_scores_of_masks_are_those_of_pycocotools_on_the_json(coco, seed):
    for number, annotation in enumerate(coco.data["annotations"]):
        if not annotation["iscrowd"]:
            annotation["segmentation"] = [[2, 3, 20 + number, 3, 20 + number, 30, 2, 30], [1, 1, 5, 1, 5, 5]]
    manifest = coco.write()
    boxes = guesses(coco.data, manifest, seed)
    detections = with_masks(coco.data, manifest, boxes, seed)
    score = score_detections(manifest, detections)
    masks = reference(coco.annotations, manifest, detections, kind="segm")
    assert {name: score.metrics[name] for name in METRICS} == reference(coco.annotations, manifest, boxes)
    assert [score.metrics[name] for name in MASK_METRICS] == list(masks.values())
    assert 0 < score.metrics["mask_AP"] < 1
    assert score.metrics["mask_AP"] != score.metrics["AP"]
    scored = [scored_class.mask_ap for scored_class in score.classes if scored_class.mask_ap > -1]
    assert np.mean(scored) == pytest.approx(score.metrics["mask_AP"])


def test_without_masks_no_figures_of_masks_are_given(coco):
    manifest = coco.write()
    score = score_detections(manifest, guesses(coco.data, manifest))
    assert tuple(score.metrics) == METRICS
    assert {scored_class.mask_ap for scored_class in score.classes} == {None}


def test_masks_are_scored_on_the_images_asked_for(coco):
    manifest = coco.write()
    detections = with_masks(coco.data, manifest, guesses(coco.data, manifest))
    rows = manifest.index().rows_of([100, 142])
    chosen = detections.take(np.isin(detections.image_ids, [100, 142]))
    masks = reference(coco.annotations, manifest, chosen, [100, 142], kind="segm")
    found = coco_metrics(manifest, chosen, rows=rows)
    assert [found[name] for name in MASK_METRICS] == list(masks.values())


def test_no_detections_with_masks_score_nothing(coco):
    manifest = coco.write()
    metrics = coco_metrics(manifest, Detections.empty(masks=True))
    assert (metrics["mask_AP"], metrics["mask_AR100"]) == (0, 0)


def test_detections_with_and_without_masks_do_not_mix(coco):
    manifest = coco.write()
    boxes = guesses(coco.data, manifest)
    masks = with_masks(coco.data, manifest, boxes)
    joined = Detections.concatenate([masks, Detections.empty(), masks])
    assert joined.masks.tolist() == masks.masks.tolist() * 2
    with pytest.raises(ShardError, match="masks of all or of none"):
        Detections.concatenate([masks, boxes])
    with pytest.raises(ShardError, match="one for each of the 27 detections"):
        replace(boxes, masks=np.empty(3, object))
