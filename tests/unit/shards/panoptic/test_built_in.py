"""The built-in data set on stuff: the same files each time, in COCO's format without a defect."""

import json
from pathlib import Path

import numpy as np
import pytest

from shards.errors import ShardError
from shards.panoptic.built_in import LEAST_STUFF, STUFF_IDS, SyntheticPanoptic, write_synthetic_panoptic
from shards.panoptic.segment_png import read_ids
from shards.source.report import load_report
from shards.write.writer import write_panoptic


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> SyntheticPanoptic:
    return write_synthetic_panoptic(tmp_path_factory.mktemp("panoptic"), train=24, val=2, seed=5)


def content(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_bytes_depend_on_the_arguments_alone(written: SyntheticPanoptic, tmp_path: Path) -> None:
    write_synthetic_panoptic(tmp_path, train=24, val=2, seed=5)
    assert content(tmp_path) == content(written.train.images.parent)


def test_it_is_written_without_a_defect(written: SyntheticPanoptic, tmp_path: Path) -> None:
    manifest = write_panoptic(written.train.images, written.train.annotations, written.train.segments, tmp_path / "out")
    assert load_report(manifest).defects == ()
    assert [category.id for category in manifest.categories] == [1, 2, 3, 4, *STUFF_IDS]
    assert [category.isthing for category in manifest.categories] == [True] * 4 + [False] * 3
    assert np.bincount(manifest.index().annotations["label"], minlength=7).min() > 0


def test_stuff_occurs_once_and_some_pixels_are_void(written: SyntheticPanoptic) -> None:
    void = 0
    for entry in json.loads(written.train.annotations.read_bytes())["annotations"]:
        segments = entry["segments_info"]
        stuff = [segment["category_id"] for segment in segments if segment["category_id"] in STUFF_IDS]
        assert 1 <= len(stuff) == len(set(stuff))
        assert all(segment["area"] >= LEAST_STUFF for segment in segments if segment["category_id"] in STUFF_IDS)
        void += int((read_ids((written.train.segments / entry["file_name"]).read_bytes()) == 0).sum())
    assert 0 < void < 0.2 * 24 * 96 * 96


def test_too_small_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="got size 8"):
        write_synthetic_panoptic(tmp_path, size=8)
