"""Panoptic post-processing and quality against figures of the originals, which `figures/panoptic/README.md` describes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detr.panoptic import panoptic
from shards.errors import ShardError
from shards.panoptic.segment_png import read_ids
from shards.panoptic.segments import TrueSegments
from shards.score.panoptic_folders import score_folders
from shards.score.panoptic_quality import GroupQuality, ImageCounts, PanopticQuality, count, quality
from tests.support.panoptic_figures import FIGURES, Case, build_case, plain_panoptic

CASES: dict[str, Any] = {case["name"]: case for case in json.loads((FIGURES / "postprocess.json").read_text())}
PQ: dict[str, Any] = json.loads((FIGURES / "pq/expected.json").read_text())
QUIRK = "two-images-padded-as-the-original"


@pytest.mark.parametrize("name", CASES)
def test_post_processing(name: str) -> None:
    """The figures allow for 0.1% of the pixels in another segment; there is none."""
    case, expected = build_case(CASES[name]), CASES[name]["segments_info"]
    pixels = np.load(FIGURES / "postprocess.npz")
    for image, (size, original) in enumerate(zip(case.sizes, case.original_sizes, strict=True)):
        one = case.outputs._replace(logits=case.outputs.logits[[image]], masks=case.outputs.masks[[image]])
        # The original takes the canvas for the image, which only differs in a padded batch.
        found = panoptic(one, [original], [size], size, case.stuff, case.threshold)[0]
        assert [(s.label, s.area) for s in found.segments] == [(s["category_id"], s["area"]) for s in expected[image]]
        assert [case.stuff[s.label] for s in found.segments] == [not s["isthing"] for s in expected[image]]
        assert np.array_equal(np.maximum(found.indices.numpy(), 0), pixels[f"{name}/{image}"])
        assert (found.indices.numpy() < 0).all() == (not found.segments)


def test_batch_gives_what_its_images_give_alone() -> None:
    case = build_case(CASES["two-images"])
    found = panoptic(case.outputs, case.original_sizes, case.sizes, None, case.stuff)
    assert [len(result.segments) for result in found] == [
        len(expected) for expected in CASES["two-images"]["segments_info"]
    ]
    pixels = np.load(FIGURES / "postprocess.npz")
    for image, result in enumerate(found):
        assert np.array_equal(result.indices.numpy(), pixels[f"two-images/{image}"])


def test_padded_image_is_cut_from_its_canvas() -> None:
    """The original stretches the canvas; the cut differs from its figures, and is what a picture of the canvas shows."""
    case, pixels = build_case(CASES[QUIRK]), np.load(FIGURES / "postprocess.npz")
    canvas = (96, 128)
    found = panoptic(case.outputs, case.sizes, case.sizes, canvas, case.stuff)
    of_canvas = panoptic(case.outputs, [canvas] * 2, [canvas] * 2, canvas, case.stuff)
    for image, (height, width) in enumerate(case.sizes):
        queries, whole = (np.array([s.query for s in r.segments]) for r in (found[image], of_canvas[image]))
        cut = whole[of_canvas[image].indices.numpy()[:height, :width]]
        assert (queries[found[image].indices.numpy()] == cut).mean() > 0.999
    ours = panoptic(case.outputs, case.original_sizes, case.sizes, canvas, case.stuff)
    assert (ours[0].indices.numpy() != pixels[f"{QUIRK}/0"]).mean() > 0.05


@pytest.mark.parametrize("name", sorted(PQ))
def test_quality(name: str) -> None:
    folder, expected = FIGURES / "pq" / name, PQ[name]
    files = (folder / "gt.json", folder / "gt", folder / "pred.json", folder / "pred")
    if name.startswith("error-"):
        problem = {
            "png": "in the PNG but not in",
            "json": "in segments_info but not in",
            "unknown": "unknown category",
            "image": "no prediction",
        }
        with pytest.raises(ShardError, match=problem[name.split("-")[1]]):
            score_folders(*files)
        return
    assert_quality(score_folders(*files), expected, folder)
    assert_quality(counted(folder), expected, folder)


def assert_quality(found: PanopticQuality, expected: dict[str, Any], folder: Path) -> None:
    for group, mean in (("All", found.all), ("Things", found.things), ("Stuff", found.stuff)):
        assert_group(mean, expected[group], 1e-9)
    ids = sorted(category["id"] for category in json.loads((folder / "gt.json").read_text())["categories"])
    for label, category in enumerate(map(str, ids)):
        of_class, none = found.classes[label], {"iou": 0.0, "tp": 0, "fp": 0, "fn": 0}
        counts = expected["counts"].get(category, none)
        assert (of_class.matched, of_class.false, of_class.missed) == (counts["tp"], counts["fp"], counts["fn"])
        assert of_class.overlap == pytest.approx(counts["iou"], abs=1e-9)
        figures = expected["per_class"].get(category, {"pq": 0.0, "sq": 0.0, "rq": 0.0})
        assert [of_class.pq, of_class.sq, of_class.rq] == pytest.approx(
            [figures[n] for n in ("pq", "sq", "rq")], abs=1e-9
        )


def assert_group(found: GroupQuality | None, expected: dict[str, float] | None, tolerance: float) -> None:
    if expected is None or found is None:
        assert found is expected
    else:
        assert found.n == expected["n"]
        assert [found.pq, found.sq, found.rq] == pytest.approx([expected[n] for n in ("pq", "sq", "rq")], abs=tolerance)


def counted(folder: Path) -> PanopticQuality:
    """Count a case image by image, as an evaluation does."""
    truth, labels, things = read_truth(folder)
    predicted = {a["image_id"]: a for a in json.loads((folder / "pred.json").read_text())["annotations"]}
    counts = []
    for image, segments in truth.items():
        ids = read_ids((folder / "pred" / predicted[image]["file_name"]).read_bytes())
        found = predicted[image]["segments_info"]
        indices = np.full(ids.shape, -1)
        for index, segment in enumerate(found):
            indices[ids == segment["id"]] = index
        counts.append(count(segments, indices, [labels[segment["category_id"]] for segment in found]))
    return quality(counts, things)


def read_truth(folder: Path) -> tuple[dict[int, TrueSegments], dict[int, int], list[bool]]:
    """Return the segments by image, labels by category, and which labels are things."""
    document = json.loads((folder / "gt.json").read_text())
    categories = sorted(document["categories"], key=lambda category: category["id"])
    labels = {category["id"]: label for label, category in enumerate(categories)}
    truth = {}
    for annotation in document["annotations"]:
        segments = annotation["segments_info"]
        truth[annotation["image_id"]] = TrueSegments(
            read_ids((folder / "gt" / annotation["file_name"]).read_bytes()),
            np.array([segment["id"] for segment in segments], np.uint32),
            np.array([labels[segment["category_id"]] for segment in segments], np.int64),
            np.array([segment["area"] for segment in segments], np.float64),
            np.array([segment["iscrowd"] for segment in segments], np.bool_),
        )
    return truth, labels, [bool(category["isthing"]) for category in categories]


def test_masks_to_quality() -> None:
    """One pixel moves a small segment's IoU by 0.001."""
    truth, labels, things = read_truth(FIGURES / "end-to-end")
    counts = list[ImageCounts]()
    for described in json.loads((FIGURES / "end-to-end/cases.json").read_text()):
        case = build_case(described)
        found = panoptic(case.outputs, case.original_sizes, case.sizes, None, case.stuff, case.threshold)[0]
        found_labels = [labels[segment.label] for segment in found.segments]
        counts.append(count(truth[described["image_id"]], found.indices.numpy(), found_labels))
    expected, result = json.loads((FIGURES / "end-to-end/expected.json").read_text()), quality(counts, things)
    for group, mean in (("All", result.all), ("Things", result.things), ("Stuff", result.stuff)):
        assert_group(mean, expected[group], 2e-3)
    per_class = {str(category): result.classes[label].pq for category, label in labels.items()}
    assert all(
        per_class[category] == pytest.approx(of["pq"], abs=2e-3) for category, of in expected["per_class"].items()
    )


@pytest.mark.parametrize("name", [name for name in CASES if name != QUIRK])
def test_plain_form_of_the_original_gives_its_figures(name: str) -> None:
    """It is what the benchmark and the property tests compare with."""
    case: Case = build_case(CASES[name])
    assert case.outputs.masks is not None
    for image, (size, original) in enumerate(zip(case.sizes, case.original_sizes, strict=True)):
        logits, masks = case.outputs.logits[image], case.outputs.masks[image]
        _, segments = plain_panoptic(logits, masks, size, original, case.stuff, case.threshold)
        expected = CASES[name]["segments_info"][image]
        assert segments == [(segment["category_id"], segment["area"]) for segment in expected]
