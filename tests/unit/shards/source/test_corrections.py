"""Reviewed corrections of labels, applied as a data set is written."""

import hashlib
import json

import numpy as np
import pytest

from shards.dataset.verify import verify
from shards.errors import ShardError
from shards.read.stock import verify_stock
from shards.source.corrections import kept_corrections
from shards.source.report import load_report
from shards.write.writer import write_coco


def write(coco, *entries, out="corrected", raw=None):
    coco.annotations.write_text(json.dumps(coco.data))
    path = coco.root / "corrections.json"
    path.write_text(json.dumps({"corrections": entries}) if raw is None else raw)
    return write_coco(coco.images, coco.annotations, coco.root / out, corrections=path)


def labels(manifest):
    """Return category id and box by annotation id."""
    return {
        int(entry["annotation_id"]): (manifest.categories[entry["label"]].id, entry["bbox"].tolist())
        for entry in manifest.index().annotations
    }


def test_every_action_changes_its_annotation_and_no_other(coco):
    before = labels(coco.write())
    after = labels(
        write(
            coco,
            {"action": "delete", "annotation_id": 12, "image_id": 107},
            {"action": "relabel", "annotation_id": 16, "category_id": 7},
            {"action": "move", "annotation_id": 17, "bbox": [1, 2, 8, 7], "note": "half a metre off"},
            {"action": "add", "image_id": 107, "category_id": 3, "bbox": [4, 5, 6, 7]},
        )
    )
    expected = dict(before)
    del expected[12]
    expected |= {16: (7, before[16][1]), 17: (7, [1, 2, 8, 7]), 20: (3, [4, 5, 6, 7])}
    assert after == expected


def test_shards_hold_the_corrected_labels(coco):
    manifest = write(
        coco,
        {"action": "relabel", "annotation_id": 16, "category_id": 7},
        {"action": "move", "annotation_id": 17, "bbox": [1, 2, 8, 7]},
    )
    assert verify(manifest.url).ok
    assert verify_stock(manifest.url).ok  # the annotations in the tars are those of the index
    moved = manifest.index().annotations[manifest.index().annotations["annotation_id"] == 17][0]
    assert moved["area"] == 56


def test_what_is_not_approved_is_not_applied(coco):
    approved = {"action": "delete", "annotation_id": 12}
    manifest = write(coco, approved, {"action": "delete", "annotation_id": 16, "apply": False})
    assert 12 not in labels(manifest)
    assert 16 in labels(manifest)


def test_the_lineage_has_the_digest_and_the_file(coco):
    plain = coco.write()
    manifest = write(coco, {"action": "delete", "annotation_id": 12})
    content = (coco.root / "corrections.json").read_bytes()
    assert manifest.corrections_digest == hashlib.sha256(content).hexdigest()
    assert (coco.root / "corrected" / "corrections.json").read_bytes() == content
    assert manifest.source_digest != plain.source_digest
    assert (kept_corrections(manifest), kept_corrections(plain)) == ({"delete": 1}, {})
    assert manifest.annotations_digest == plain.annotations_digest == plain.source_digest
    assert plain.corrections_digest == ""
    assert b"correct" not in plain.to_json()  # and so the digests of data sets without corrections are as before


def test_the_same_corrections_find_their_data_set_and_others_do_not(coco):
    entry = {"action": "delete", "annotation_id": 12}
    assert write(coco, entry).digest == write(coco, entry).digest
    with pytest.raises(ShardError, match="already holds another data set"):
        write(coco, {"action": "delete", "annotation_id": 16})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"action": "delete", "annotation_id": 99}, "delete of annotation 99: no annotation has this id"),
        ({"action": "delete", "annotation_id": 12, "image_id": 100}, "annotation 12: it is of image 107, not 100"),
        ({"action": "relabel", "annotation_id": 12}, r"corrections\[0\]: relabel needs category_id"),
        ({"action": "relabel", "annotation_id": 12, "category_id": 5}, "there is no category 5"),
        ({"action": "move", "annotation_id": 12, "bbox": [1, 1, 0, 5]}, "expected a width and height above 0"),
        ({"action": "add", "image_id": 5, "category_id": 3, "bbox": [1, 1, 5, 5]}, "add of image 5: there is no such"),
        ({"action": "erase", "annotation_id": 12}, r"Invalid enum value 'erase'"),
        ({"action": "delete", "annotation": 12}, "unknown field `annotation`"),
    ],
    ids=lambda value: value["action"] if isinstance(value, dict) else "",
)
def test_corrections_that_do_not_fit_are_refused(coco, entry, message):
    with pytest.raises(ShardError, match=message) as caught:
        write(coco, entry)
    assert "\n" not in str(caught.value)
    assert not (coco.root / "corrected").exists()


def test_a_file_that_is_no_corrections_is_refused(coco):
    with pytest.raises(ShardError, match="as `detr evaluate --report` writes it"):
        write(coco, raw="[]")


def test_a_corrected_box_is_checked_like_any_other(coco):
    manifest = write(coco, {"action": "move", "annotation_id": 17, "bbox": [500, 500, 10, 10]})
    noted = [defect.kind for defect in load_report(manifest).defects if defect.annotation_id == 17]
    assert "box-off-image" in noted


def test_ids_of_added_annotations_are_new(coco):
    entries = [{"action": "add", "image_id": 107, "category_id": 3, "bbox": [4, 5, 6, number]} for number in (7, 8)]
    manifest = write(coco, *entries)
    ids = manifest.index().annotations["annotation_id"]
    assert len(np.unique(ids)) == len(ids) == 11
