"""Panoptic data sets: PNGs untouched beside the images, the index of their segments, and the same bytes each time."""

import json
import pickle
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from shards.config import WriteConfig
from shards.dataset.manifest import Manifest, load_manifest
from shards.dataset.verify import verify
from shards.errors import ShardError
from shards.panoptic.segment_png import write_png
from shards.source.defects import SourceError
from shards.write import shard, writer
from shards.write.writer import write_panoptic
from tests.support.panoptic_data import CAR, GRASS, PERSON, SKY, Panoptic, make_panoptic, maps


@pytest.fixture
def source(tmp_path: Path) -> Panoptic:
    return make_panoptic(tmp_path)


def members(manifest: Manifest) -> dict[str, bytes]:
    found = {}
    for name in (listed.name for listed in manifest.shards):
        with tarfile.open(Path(manifest.url) / name) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    return found


def test_images_pngs_and_all_fields_of_segments_are_in_the_tars(source: Panoptic) -> None:
    found = members(source.write())
    for image in source.data["images"]:
        key = f"{image['id']:012d}"
        assert found[f"{key}.jpg"] == (source.images / f"{image['id']}.jpg").read_bytes()
        assert found[f"{key}.segments.png"] == source.png(image["id"]).read_bytes()
        annotation = source.annotation(image["id"])
        assert json.loads(found[f"{key}.json"]) == {
            "image": image,
            "segments": annotation["file_name"],
            "annotations": annotation["segments_info"],
        }
    assert len(found) == 9


def test_things_and_stuff_are_labels_by_id_and_the_manifest_keeps_which_is_which(source: Panoptic) -> None:
    manifest = load_manifest(source.write().url)
    assert manifest.panoptic
    assert [(category.id, category.isthing) for category in manifest.categories] == [
        *((PERSON, True), (CAR, True), (GRASS, False), (SKY, False))
    ]
    assert manifest.categories[3].color == (70, 130, 180)
    (row,) = manifest.index().rows_of([3])
    segments = manifest.index().annotations_of(row)
    assert segments["annotation_id"].tolist() == [9, 300, 301]
    assert segments["label"].tolist() == [2, 0, 1]
    assert segments["iscrowd"].tolist() == [0, 1, 0]
    assert segments["area"].tolist() == [600 - 40 - 14, 40, 14]
    assert segments["bbox"].tolist() == [[0, 0, 30, 20], [5, 5, 10, 4], [20, 3, 1, 14]]
    assert manifest.index().boxes_per_image[row] == 3  # crowds are learned


def test_shards_written_elsewhere_and_a_rerun_give_the_same_bytes(source: Panoptic) -> None:
    def elsewhere(function: Any, jobs: Iterable[Any]) -> Iterator[Any]:
        for job in jobs:
            task, given = pickle.loads(pickle.dumps((function, job)))  # noqa: S301
            yield task(given)

    first = source.write("a", samples_per_shard=1)
    paths = source.images, source.annotations, source.segments
    second = write_panoptic(*paths, source.root / "b", WriteConfig(samples_per_shard=1), map=elsewhere)
    assert first.digest == second.digest
    assert source.write("a", samples_per_shard=1) == first


def test_other_pngs_make_another_data_set(source: Panoptic) -> None:
    first = source.write("a")
    ids = maps()[12]
    ids[0, 0] = 0
    source.png(12).write_bytes(write_png(ids))
    assert source.write("b").digest != first.digest
    with pytest.raises(ShardError, match=r"an image is not as in .* such as image 12"):
        source.write("a")


def test_the_folder_that_changed_is_named(source: Panoptic) -> None:
    source.write()
    source.png(12).write_bytes(write_png(maps()[7]))
    with pytest.raises(ShardError, match=f"an image is not as in {source.segments} now, such as image 12"):
        source.write()


def test_a_segment_without_pixels_stops_the_writing_of_its_shard(
    source: Panoptic, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.png(3).write_bytes(write_png(np.full((20, 30), 9)))  # image 3 is the first
    added = mock.Mock()
    monkeypatch.setattr(shard, "_add_panoptic", added)
    with pytest.raises(SourceError, match="segment 300 of image 3: has no pixels"):
        source.write()
    added.assert_not_called()


def test_a_png_that_was_left_out_and_is_sound_now_is_noticed(source: Panoptic) -> None:
    sound = source.png(12).read_bytes()
    source.png(12).write_bytes(sound[:-40])
    first = source.write(on_defect="quarantine")
    assert first.images == 2
    assert source.write(on_defect="quarantine") == first
    source.png(12).write_bytes(sound)
    with pytest.raises(ShardError, match="such as image 12"):
        source.write(on_defect="quarantine")


def test_leftover_shards_of_other_pngs_are_written_again(source: Panoptic, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(writer, "_write_rest", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            source.write(samples_per_shard=1)
    ids = maps()[12]
    ids[0, 0] = 6  # of the same length and not in the JSON: noted
    source.png(12).write_bytes(write_png(ids))
    written = []
    add = shard._add_panoptic
    monkeypatch.setattr(shard, "_add_panoptic", lambda *given: written.append(given[1].image.image_id) or add(*given))
    manifest = source.write(samples_per_shard=1)
    assert written == [12]
    assert verify(manifest.url).ok


def test_a_segment_without_pixels_is_in_neither_the_index_nor_the_json(source: Panoptic) -> None:
    ids = maps()[7]
    ids[ids == 70000] = 0
    source.png(7).write_bytes(write_png(ids))
    manifest = source.write(on_defect="quarantine")
    (row,) = manifest.index().rows_of([7])
    assert manifest.index().annotations_of(row)["annotation_id"].tolist() == [5, 2**24 - 1]
    assert manifest.index().annotations_of(row)["label"].tolist() == [3, 1]
    entry = json.loads(members(manifest)["000000000007.json"])
    assert [segment["id"] for segment in entry["annotations"]] == [5, 2**24 - 1]


@pytest.mark.parametrize("box", [None, [2, 10, 22, 6]])
def test_boxes_are_those_of_the_pixels(source: Panoptic, box: list[int] | None) -> None:
    source.segment(7, 70000)["bbox"] = box
    manifest = source.write()
    (row,) = manifest.index().rows_of([7])
    assert manifest.index().annotations_of(row)["bbox"][1].tolist() == [2, 10, 23, 6]


def test_a_changed_png_is_found_in_the_shard(source: Panoptic) -> None:
    manifest = source.write()
    assert verify(manifest.url).ok
    record = manifest.index().images[0]
    path = Path(manifest.url) / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    content[int(record["text_offset"]) + 60] ^= 1
    path.write_bytes(content)
    (problem,) = verify(manifest.url).problems
    assert f"panoptic PNGs of 1 samples differ from the index, such as image {int(record['image_id'])}" in problem


def test_a_manifest_with_things_among_plain_categories_is_refused(source: Panoptic) -> None:
    path = Path(source.write().url) / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"isthing": true', b'"isthing": null', 1))
    with pytest.raises(ShardError, match="only some categories are things or stuff"):
        load_manifest(path.parent)


def test_an_image_without_segments_is_all_void(source: Panoptic) -> None:
    source.annotation(12)["segments_info"] = []
    source.png(12).write_bytes(write_png(np.zeros((20, 30), int)))
    manifest = source.write()
    assert (manifest.images, manifest.annotations) == (3, 6)


@pytest.mark.parametrize("folder", ["images", "segments"])
@pytest.mark.parametrize("policy", ["fail", "quarantine"])
def test_a_node_that_does_not_see_a_folder_loses_no_images(source: Panoptic, folder: str, policy: Any) -> None:
    def unmounted(function: Any, jobs: Iterable[Any]) -> Iterator[Any]:
        listed = list(jobs)
        (source.root / folder).rename(source.root / "elsewhere")
        yield from map(function, listed)

    source.annotations.write_text(json.dumps(source.data))
    paths = source.images, source.annotations, source.segments
    with pytest.raises(ShardError, match=f"no such folder of {folder} on "):
        write_panoptic(*paths, source.root / "out", WriteConfig(on_defect=policy), map=unmounted)
