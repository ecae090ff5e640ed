"""Samples of panoptic data sets: boxes from the index alone, masks and the truth from the PNG."""

from pathlib import Path

import numpy as np
import pytest

from shards.dataset.manifest import Manifest
from shards.errors import BadSampleError, ShardError
from shards.masks.rle import decode_masks
from shards.panoptic import segment_png
from shards.read import segments
from shards.read.member_reader import MemberReader
from shards.read.sample import SampleReader
from shards.read.segmentations import check_segmentations, true_runs
from tests.support.panoptic_data import make_panoptic, maps


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_panoptic(tmp_path).write()


def row_of(manifest: Manifest, image_id: int) -> int:
    return int(manifest.index().rows_of([image_id])[0])


def test_boxes_end_at_the_last_pixel_and_crowds_are_objects(manifest: Manifest) -> None:
    reader = SampleReader(manifest, masks=True)
    sample = reader.read(row_of(manifest, 3))
    assert sample.panoptic
    assert sample.labels.tolist() == [2, 0, 1]
    assert sample.boxes_xyxy.tolist() == [[0, 0, 29, 19], [5, 5, 14, 8], [20, 3, 20, 16]]
    assert sample.boxes_xyxy.dtype == np.float32
    ids = maps()[3]
    assert np.array_equal(sample.masks, np.stack([ids == 9, ids == 300, ids == 301]))
    assert reader.read(row_of(manifest, 7)).boxes_xyxy[2].tolist() == [29, 18, 29, 18]


def test_boxes_alone_are_read_without_the_png(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("segmentations", "image_and_segmentations"):
        monkeypatch.setattr(MemberReader, name, lambda *_: pytest.fail("read the PNG"))
    sample = SampleReader(manifest).read(1)
    assert sample.masks is None
    assert len(sample.boxes_xyxy) == manifest.index().images["count"][1]


def test_the_truth_has_the_areas_of_the_json_and_all_ids_of_the_png(tmp_path: Path) -> None:
    source = make_panoptic(tmp_path)
    source.segment(3, 300)["area"] = 41
    manifest = source.write()
    truth = SampleReader(manifest).segments(row_of(manifest, 3))
    assert np.array_equal(truth.ids, maps()[3])
    assert truth.ids.dtype == truth.segment_ids.dtype == np.uint32
    assert truth.segment_ids.tolist() == [9, 300, 301]
    assert truth.labels.tolist() == [2, 0, 1]
    assert truth.areas.tolist() == [546, 41, 14]
    assert truth.crowds.tolist() == [False, True, False]


def test_run_lengths_are_those_of_the_masks(manifest: Manifest) -> None:
    row = row_of(manifest, 3)
    runs = true_runs(manifest, np.array([row]))
    masks = SampleReader(manifest, masks=True).read(row).masks
    assert np.array_equal(decode_masks(runs, 20, 30), masks)
    check_segmentations(manifest)


def test_a_png_of_another_size_names_the_image(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "read_ids", lambda content: segment_png.read_ids(content)[1:])
    with pytest.raises(BadSampleError, match=r"image 3 in shard-000000.tar: its PNG has 19 rows and 30 columns"):
        SampleReader(manifest).segments(row_of(manifest, 3))


def test_a_data_set_of_boxes_has_no_segments(coco) -> None:
    with pytest.raises(ShardError, match="expected a panoptic one"):
        SampleReader(coco.write()).segments(0)


def test_a_changed_png_is_named(manifest: Manifest) -> None:
    path = Path(manifest.url) / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    content[int(manifest.index().images[0]["text_offset"]) + 60] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadSampleError, match=r"image 3 in shard-000000.tar: the bytes of its PNG of segments changed"):
        SampleReader(manifest, masks=True).read(0)
