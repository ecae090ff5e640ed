import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from detr.model import Outputs
from pipeline.distributed.ranks import Ranks
from pipeline.errors import RunConfigError, TrainingError
from pipeline.evaluation.evaluate_model import EvaluateOptions, Evaluation, evaluate_model, match_categories
from shards.config import WriteConfig
from shards.dataset.categories import Category
from shards.dataset.manifest import Manifest, load_manifest
from shards.workers import Progress
from shards.write.writer import write_coco
from tests.support.coco_results import coco_results
from tests.support.oracle import OPTIONS, TRANSFORM, Oracle

NAMES = ("circle", "square", "triangle", "cross")


@dataclass(frozen=True)
class Renumbered:
    root: Path
    make: Callable[[dict[int, tuple[int, str]]], Manifest]


@pytest.fixture
def renumbered(tiny_data: Any, tmp_path: Path) -> Renumbered:
    """Shards of the validation images whose category ids and names are mapped; other annotations are left out."""

    def make(mapping: dict[int, tuple[int, str]]) -> Manifest:
        coco = json.loads((tiny_data.root / "coco" / "annotations" / "instances_val.json").read_text())
        coco["annotations"] = [
            annotation | {"category_id": mapping[annotation["category_id"]][0]}
            for annotation in coco["annotations"]
            if annotation["category_id"] in mapping
        ]
        coco["categories"] = [{"id": number, "name": name} for number, name in mapping.values()]
        path = tmp_path / "instances.json"
        path.write_text(json.dumps(coco))
        out = tmp_path / f"out-{'-'.join(str(number) for number, _ in mapping.values())}"
        return write_coco(tiny_data.root / "coco" / "val", path, out, WriteConfig())

    return Renumbered(tiny_data.root, make)


def score(
    manifest: Manifest,
    categories: tuple[Category, ...],
    masks: bool = False,
    options: EvaluateOptions = OPTIONS,
    progress: Progress | None = None,
) -> tuple[Oracle, Evaluation]:
    oracle = Oracle(manifest, categories, masks)
    found = evaluate_model(oracle, manifest, categories, options, progress=progress)
    assert found is not None
    return oracle, found


def test_perfect_predictions_score_1_and_each_image_is_seen_once(tiny_data: Any) -> None:
    manifest = load_manifest(tiny_data.val)
    reported: list[tuple[int, int]] = []
    oracle, found = score(manifest, manifest.categories, progress=lambda done, total: reported.append((done, total)))
    assert found.score.metrics["AP"] == pytest.approx(1.0)
    assert oracle.calls == [2, 2, 1]
    assert reported == [(2, 5), (4, 5), (5, 5)]
    assert np.unique(found.detections.image_ids).tolist() == sorted(manifest.index().images["image_id"].tolist())


def test_perfect_masks_score_1(tiny_data: Any) -> None:
    manifest = load_manifest(tiny_data.val)
    _, found = score(manifest, manifest.categories, masks=True)
    assert found.score.metrics["AP"] == pytest.approx(1.0)
    assert found.score.metrics["mask_AP"] == pytest.approx(1.0)
    assert found.detections.masks is not None
    assert len(found.detections.masks) == 5 * 8


def test_masks_of_unknown_classes_are_left_out_with_their_boxes(renumbered: Renumbered) -> None:
    subset = renumbered.make({2: (13, "square"), 4: (90, "cross")})
    categories = tuple(Category(number, name) for number, name in zip((7, 13, 21, 90), NAMES, strict=True))
    _, found = score(subset, categories, masks=True)
    assert found.score.metrics["mask_AP"] == pytest.approx(1.0)
    assert [score.mask_ap for score in found.score.classes] == pytest.approx([1.0, 1.0])


def test_evaluation_mode_is_set_and_the_previous_mode_restored(tiny_data: Any) -> None:
    manifest = load_manifest(tiny_data.val)
    oracle = Oracle(manifest, manifest.categories)
    for mode in (True, False):
        oracle.train(mode)
        evaluate_model(oracle, manifest, manifest.categories, replace(OPTIONS, batch_size=5))
        assert oracle.training is mode
    assert oracle.modes == [False, False]


@pytest.mark.parametrize(
    "ids",
    [(0, 1, 2, 3), (1, 2, 3, 4), (7, 13, 21, 90), (90, 21, 13, 7)],
    ids=["0-based", "1-based", "gaps", "permuted"],
)
def test_results_have_the_category_ids_of_any_numbering(renumbered: Renumbered, ids: tuple[int, ...]) -> None:
    manifest = renumbered.make({old: (new, NAMES[old - 1]) for old, new in zip((1, 2, 3, 4), ids, strict=True)})
    _, found = score(manifest, manifest.categories)
    assert found.score.metrics["AP"] == pytest.approx(1.0)
    results = coco_results(manifest, found.detections)
    sure = sorted((result["image_id"], result["category_id"]) for result in results if result["score"] > 0.5)
    index = manifest.index()
    truth = [
        (int(index.images["image_id"][row["image"]]), manifest.categories[row["label"]].id) for row in index.annotations
    ]
    assert sure == sorted(truth)


def test_labels_are_mapped_by_category_id(renumbered: Renumbered) -> None:
    """A model of ids 7 to 90 meets a data set with two of them: its labels 1 and 3 are the data set's 0 and 1."""
    subset = renumbered.make({2: (13, "square"), 4: (90, "cross")})
    categories = tuple(Category(number, name) for number, name in zip((7, 13, 21, 90), NAMES, strict=True))
    assert match_categories(categories, subset).tolist() == [-1, 0, -1, 1]
    _, found = score(subset, categories)
    assert found.score.metrics["AP"] == pytest.approx(1.0)
    assert [score.name for score in found.score.classes] == ["square", "cross"]


def test_classes_that_the_model_lacks_score_0(renumbered: Renumbered) -> None:
    manifest = renumbered.make({number: (number, name) for number, name in enumerate(NAMES, start=1)})
    _, found = score(manifest, (Category(2, "square"),))
    aps = {score.name: score.ap for score in found.score.classes}
    assert aps["square"] == pytest.approx(1.0)
    assert all(ap <= 0 for name, ap in aps.items() if name != "square")


def test_a_category_id_with_another_name_is_refused(tiny_data: Any) -> None:
    manifest = load_manifest(tiny_data.val)
    with pytest.raises(RunConfigError, match=r"category 2 is 'bus' to the model and 'square' in .*expected the same"):
        match_categories((Category(1, "circle"), Category(2, "bus")), manifest)


def test_a_data_set_that_shares_no_category_is_refused(tiny_data: Any) -> None:
    with pytest.raises(RunConfigError, match="share no category"):
        match_categories((Category(70, "toaster"),), load_manifest(tiny_data.val))


def test_a_limit_scores_only_that_many_images(tiny_data: Any) -> None:
    manifest = load_manifest(tiny_data.val)
    oracle, found = score(manifest, manifest.categories, options=replace(OPTIONS, limit=3))
    assert oracle.calls == [2, 1]
    assert len(np.unique(found.detections.image_ids)) == found.images == 3
    assert found.score.metrics["AP"] == pytest.approx(1.0)


def test_an_image_that_two_ranks_delivered_is_refused(tiny_data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = load_manifest(tiny_data.val)
    monkeypatch.setattr(Ranks, "all_gather", lambda self, value: [value, value])
    with pytest.raises(TrainingError, match=r"delivered 10 images \(5 distinct\); expected each of the 5"):
        score(manifest, manifest.categories)


def test_boxes_come_back_in_pixels_of_the_original_image(tiny_data: Any) -> None:
    """The model sees 64 px images at 96 px; its boxes are in pixels of the 64 px images."""
    manifest = load_manifest(tiny_data.val)

    class Centre(nn.Module):
        def forward(self, images: Tensor, padding: Tensor | None) -> Outputs:
            assert images.shape[-2:] == (96, 96)
            logits = torch.zeros(len(images), 1, 5)
            return Outputs(logits, torch.tensor([[[0.5, 0.5, 0.25, 0.5]]]).expand(len(images), 1, 4))

    options = replace(OPTIONS, transform=replace(TRANSFORM, eval_size=96, max_size=96))
    found = evaluate_model(Centre(), manifest, manifest.categories, options)
    assert found is not None
    np.testing.assert_allclose(found.detections.boxes_xywh, np.tile([24.0, 16.0, 16.0, 32.0], (5, 1)), atol=1e-5)
