import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from shards.dataset.verify import verify
from shards.errors import ShardError
from shards.synthetic import CATEGORIES, MAX_SIDE, MIN_SIDE, MIN_VISIBLE, write_synthetic
from shards.write.writer import write_coco


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_synthetic(tmp_path_factory.mktemp("synthetic"), train=60, val=10, seed=5)


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_bytes_depend_on_the_arguments_and_the_seed_alone(written, tmp_path):
    root = written.train.images.parent
    write_synthetic(tmp_path / "same", train=60, val=10, seed=5)
    write_synthetic(tmp_path / "other", train=60, val=10, seed=6)
    assert content(tmp_path / "same") == content(root)
    assert not set(content(tmp_path / "other").values()) & set(content(root).values())


def test_an_image_does_not_depend_on_how_many_there_are(written, tmp_path):
    fewer = write_synthetic(tmp_path, train=3, val=1, seed=5)
    for path in fewer.train.images.iterdir():
        assert path.read_bytes() == (written.train.images / path.name).read_bytes()


def test_all_images_differ(written):
    files = [*written.train.images.iterdir(), *written.val.images.iterdir()]
    assert len({path.read_bytes() for path in files}) == len(files) == 70


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools with NumPy 2
def test_boxes_areas_and_segmentations_are_of_visible_pixels(written):
    truth = COCO(str(written.train.annotations))
    for annotation in truth.dataset["annotations"]:
        mask = truth.annToMask(annotation).astype(bool)
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        x, y, width, height = annotation["bbox"]
        assert (x, y) == (columns[0], rows[0])
        assert (x + width, y + height) == (columns[-1] + 1, rows[-1] + 1)
        assert mask.sum() == annotation["area"]
    masks = {}
    for annotation in truth.dataset["annotations"]:
        masks.setdefault(annotation["image_id"], []).append(truth.annToMask(annotation))
    assert max(np.sum(of_image, axis=0).max() for of_image in masks.values()) == 1  # no pixel belongs to two objects


def test_objects_are_of_the_sizes_and_kinds_promised(written):
    data = json.loads(written.train.annotations.read_bytes())
    counts = np.bincount([annotation["image_id"] for annotation in data["annotations"]])[1:]
    assert counts.min() >= 1
    assert counts.max() <= 5
    assert {annotation["category_id"] for annotation in data["annotations"]} == set(range(1, len(CATEGORIES) + 1))
    sides = np.array([annotation["bbox"][2:] for annotation in data["annotations"]])
    assert sides.max() <= MAX_SIDE
    assert np.median(sides.min(axis=1)) >= MIN_SIDE
    assert sides.min() >= MIN_SIDE * MIN_VISIBLE / 2  # of a shape whose edge something hides


def test_objects_contrast_with_their_surroundings(written):
    data = json.loads(written.train.annotations.read_bytes())
    names = {image_entry["id"]: image_entry["file_name"] for image_entry in data["images"]}
    centres = {}
    for annotation in data["annotations"]:
        with Image.open(written.train.images / names[annotation["image_id"]]) as image:
            x, y, width, height = annotation["bbox"]
            pixels = np.asarray(image, np.float32)
        middle = pixels[y + height // 2 - 2 : y + height // 2 + 2, x + width // 2 - 2 : x + width // 2 + 2].mean(
            axis=(0, 1)
        )
        centres[annotation["id"]] = np.linalg.norm(middle - pixels.mean(axis=(0, 1)))
    assert np.median(list(centres.values())) > 60


def test_synthetic_data_set_is_written_like_any_other(written, tmp_path):
    manifest = write_coco(written.val.images, written.val.annotations, tmp_path / "out")
    assert [category.name for category in manifest.categories] == list(CATEGORIES)
    assert manifest.index().max_boxes <= 5
    assert verify(tmp_path / "out").ok


def test_progress_counts_both_splits(tmp_path):
    calls = []
    write_synthetic(tmp_path, train=2, val=1, progress=lambda *call: calls.append(call))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_impossible_arguments_get_one_clear_line(tmp_path):
    with pytest.raises(ShardError, match="got size 32"):
        write_synthetic(tmp_path, size=32)
    (tmp_path / "file").write_text("")
    with pytest.raises(ShardError, match="cannot be written"):
        write_synthetic(tmp_path / "file")
