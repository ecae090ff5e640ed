"""Panoptic quality of files in COCO's format: a JSON and a folder of PNGs each for the truth and for the prediction.

It is counted by hotcoco, apart from `count`, which an evaluation needs: an image at a time, and without files.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from shards.errors import ShardError, one_line
from shards.score.panoptic_quality import ClassQuality, PanopticQuality, of_classes


class _Category(msgspec.Struct):
    id: int
    isthing: int


class _Truth(msgspec.Struct):
    categories: list[_Category]


def score_folders(truth: Path, true_pngs: Path, prediction: Path, predicted_pngs: Path) -> PanopticQuality:
    """Return the quality of `prediction`, a JSON with the PNGs that it names; labels are the truth's categories by id.

    Kinds of errors are not told apart. Predictions for images that the truth does not have are ignored.
    Raise `ShardError` for files that cannot be read, a true image without a prediction, an unknown category, and segments
    that are only in the JSON or only in the PNG.
    """
    from hotcoco import panoptic

    try:
        categories = msgspec.json.decode(truth.read_bytes(), type=_Truth).categories
        scorer = panoptic.PanopticEval(
            str(truth), str(prediction), gt_folder=str(true_pngs), pred_folder=str(predicted_pngs)
        )
        scorer.evaluate()
    except (ValueError, OSError) as error:  # msgspec's errors are ValueErrors
        raise ShardError(f"{prediction}: cannot be scored against {truth}: {one_line(error)}") from None
    by_category = scorer.results()["per_class"]
    categories.sort(key=lambda category: category.id)
    classes = [
        ClassQuality(label, counts["iou"], counts["tp"], counts["fn"], counts["fp"])
        for label, counts in enumerate(by_category[category.id] for category in categories)
    ]
    return of_classes(classes, [category.isthing != 0 for category in categories])
