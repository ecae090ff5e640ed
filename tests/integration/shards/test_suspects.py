"""Errors planted in the labels of real images, found by a model that knows the right ones."""

import numpy as np
import pytest

from shards.config import WriteConfig
from shards.dataset.index import Index
from shards.score.diagnosis import diagnose
from shards.write.writer import write_coco
from tests.support.labelled import learned_by_heart, with_labels, without
from tests.support.real_data import COCO_TINY

pytestmark = pytest.mark.skipif(
    not COCO_TINY.is_dir(), reason=f"no COCO images at {COCO_TINY}; set DETR_COCO_TINY to a folder of them"
)
KINDS = ("class", "box", "missing", "class", "box", "missing", "class", "box", "missing", "class")


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    annotations = COCO_TINY / "annotations" / "instances_train2017.json"
    return write_coco(COCO_TINY / "train2017", annotations, tmp_path_factory.mktemp("coco") / "right", WriteConfig())


def plant(right, seed):
    """Return the data set with ten wrong labels, and their (kind, id of annotation or, if it is missing, of image)."""
    rng = np.random.default_rng(seed)
    index = right.index()
    annotations = np.array(index.annotations)
    sides = annotations["bbox"][:, 2:].min(axis=1)
    chosen = rng.choice(np.flatnonzero((annotations["iscrowd"] == 0) & (sides > 20)), len(KINDS), replace=False)
    planted = set()
    for kind, number in zip(KINDS, chosen.tolist(), strict=True):
        if kind == "class":
            annotations["label"][number] = (annotations["label"][number] + rng.integers(1, 80)) % 80
        elif kind == "box":
            annotations["bbox"][number, 0] += 0.4 * annotations["bbox"][number, 2]
        image_id = int(index.images["image_id"][annotations["image"][number]])
        planted.add((kind, image_id if kind == "missing" else int(annotations["annotation_id"][number])))
    dropped = [number for kind, number in zip(KINDS, chosen.tolist(), strict=True) if kind == "missing"]
    return without(with_labels(right, Index(index.images, annotations)), dropped), planted


def test_planted_errors_are_among_the_first_twenty_suspects(right):
    found = []
    for seed in range(10):
        wrong, planted = plant(right, seed)
        suspects = diagnose(wrong, learned_by_heart(right, seed)).suspects
        assert len(suspects) == 20
        names = {(suspect.kind, suspect.annotation_id or suspect.image_id) for suspect in suspects}
        found.append(len(planted & names))
    # The others lie on an object of the same class, where a detection of theirs is one of its neighbour's.
    assert sum(found) >= 95
    assert min(found) >= 9
