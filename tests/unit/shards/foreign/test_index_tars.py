"""Indexing of foreign tars: ids, categories, annotations, and the resulting data set."""

import json
import shutil
import tarfile

import fsspec
import numpy as np
import pytest

from shards.dataset.verify import verify
from shards.errors import ShardError
from shards.foreign.index_tars import index_tars
from shards.plan.epoch import plan_epoch
from shards.read.loader import open_loader, read_samples
from shards.read.segmentations import true_runs
from shards.source.defects import SourceError
from tests.support.foreign_tars import index, picture, tar, thing


def test_tars_become_a_data_set_without_being_changed(tars, names):
    before = {path.name: path.read_bytes() for path in tars.iterdir()}
    manifest = index(tars, categories=names, workers=2)
    assert {path.name: path.read_bytes() for path in tars.glob("*.tar")} == before
    assert (manifest.name, manifest.images, manifest.annotations) == ("tars", 3, 3)
    assert [(shard.name, shard.samples) for shard in manifest.shards] == [("a.tar", 2), ("b.tar", 1)]
    assert [(category.id, category.name) for category in manifest.categories] == [(3, "cat"), (7, "dog")]
    images = manifest.index().images
    assert images["image_id"].tolist() == [1, 2, 3]  # not all have an id, and keys are no numbers
    assert images[["width", "height", "count"]].tolist() == [(40, 30, 1), (30, 30, 2), (20, 10, 0)]
    assert manifest.index().annotations.tolist() == [
        (1, 0, pytest.approx([1, 2, 3, 4]), 9, 0, 0),
        (2, 1, pytest.approx([5, 6, 7, 8]), 56, 1, 1),
        (3, 1, pytest.approx([0, 0, 2, 2]), 4, 0, 0),
    ]
    assert json.loads((tars / "source.json").read_bytes())["categories"][0]["supercategory"] == "animal"
    assert verify(tars).problems == ()


def test_samples_of_indexed_tars_can_be_read_and_loaded(tars, names):
    manifest = index(tars, categories=names)
    first, second, third = read_samples(manifest, [0, 1, 2])
    assert (first.image.shape, second.image.shape, third.image.shape) == ((30, 40, 3), (30, 30, 3), (10, 20, 3))
    assert first.boxes_xyxy.tolist() == [[1, 2, 4, 6]]
    assert second.labels.tolist() == [0]  # the dog is a crowd
    plan = plan_epoch(manifest, seed=1, epoch=0, batch_size=3)
    loader = open_loader(manifest, plan, transform=lambda sample: sample.image_id, collate=sorted)
    assert next(loader) == [1, 2, 3]


def test_verify_reports_a_damaged_foreign_tar(tars, names):
    record = index(tars, categories=names).index().images[1]
    content = bytearray((tars / "a.tar").read_bytes())
    content[record["offset"] + 40] ^= 1
    (tars / "a.tar").write_bytes(content)
    (problem,) = verify(tars).problems
    assert (
        "a.tar: its sha256 is not the manifest's: images of 1 samples differ from the index, such as image 2" in problem
    )


@pytest.mark.parametrize(
    ("keys", "ids", "expected"),
    [
        (["a", "b"], [9, 4], [9, 4]),
        (["7", "8"], [9, None], [7, 8]),
        (["7", "8"], [9, -1], [7, 8]),
        (["v1.0/007", "v1.0/008"], [None, None], [7, 8]),
        (["x/7", "y/7"], [None, None], [1, 2]),
        (["7", "8b"], [None, None], [1, 2]),
        (["7", "1234567890123"], [None, None], [1, 2]),
    ],
)
def test_image_ids_come_from_json_or_keys_or_positions(tmp_path, names, keys, ids, expected):
    files = []
    for key, number in zip(keys, ids, strict=True):
        files += [(f"{key}.jpg", picture()), (f"{key}.json", {"image_id": number, "annotations": []})]
    tar(tmp_path / "tars" / "a.tar", *files)
    assert index(tmp_path / "tars", categories=names).index().images["image_id"].tolist() == expected


def test_annotation_ids_are_kept_if_they_are_distinct(tmp_path, names):
    for case, ids in enumerate([(5, 4), (5, 5), (5, "4")]):
        tar(
            tmp_path / f"{case}" / "a.tar",
            ("a.jpg", picture()),
            ("a.json", [thing(1, 1, 1, 1, id=number) for number in ids]),
        )
        found = index(tmp_path / f"{case}", categories=names).index().annotations["annotation_id"].tolist()
        assert found == ([5, 4] if case == 0 else [1, 2])


def test_categories_default_to_the_names_in_the_tars(tmp_path):
    boxes = [thing(1, 1, 1, 1, category_id=None, label=name) for name in ("dog", "cat", "dog")]
    tar(tmp_path / "tars" / "a.tar", ("a.jpg", picture()), ("a.json", boxes))
    manifest = index(tmp_path / "tars", name="pets")
    assert [(category.id, category.name) for category in manifest.categories] == [(1, "cat"), (2, "dog")]
    assert manifest.index().annotations["label"].tolist() == [1, 0, 1]
    assert manifest.name == "pets"


def test_category_ids_without_names_are_refused(tars):
    with pytest.raises(ShardError, match=r"do not name their categories; expected --categories FILE") as caught:
        index(tars)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tars.iterdir()) == ["a.tar", "b.tar"]


def test_segmentations_in_tars_become_masks(tmp_path, names):
    for number, segmentation in enumerate([[[[1, 1, 9, 1, 9, 9]]], None]):
        files = [("a.jpg", picture()), ("a.json", [thing(1, 1, 8, 8)])]
        files += [("a.segmentation.json", segmentation)] if segmentation else []
        tar(tmp_path / f"{number}" / "a.tar", *files)
        manifest = index(tmp_path / f"{number}", categories=names)
        if segmentation:
            assert true_runs(manifest, np.array([0]))[0]["size"] == [30, 40]
        else:
            with pytest.raises(ShardError, match=r"image 1 in a\.tar: annotation 1 has no segmentation"):
                true_runs(manifest, np.array([0]))


def test_folders_and_links_in_a_tar_are_ignored(tars, names):
    with tarfile.open(tars / "b.tar", "a") as out:
        for name, kind in (("deep", tarfile.DIRTYPE), ("four.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            out.addfile(info)
    assert index(tars, categories=names).images == 3
    assert verify(tars).ok


def test_a_data_set_is_not_indexed_again(tars, names):
    index(tars, categories=names)
    with pytest.raises(ShardError, match=r"is a data set already; delete its manifest\.json"):
        index(tars, categories=names)


def test_folders_that_cannot_be_indexed_raise_one_line(tars, names, tmp_path):
    with pytest.raises(ShardError, match=r"memory://tars: expected WebDataset tars \(\*.tar\), found none"):
        index_tars("memory://tars")
    with pytest.raises(ShardError, match="no such folder"):
        index(tmp_path / "gone")
    (tars / "index").write_text("in the way")
    with pytest.raises(ShardError, match="cannot be written") as caught:
        index(tars, categories=names)
    assert "\n" not in str(caught.value)
    assert not (tars / "manifest.json").exists()


def test_tars_of_the_writer_get_back_their_index_and_digest(coco):
    manifest = coco.write(samples_per_shard=3)
    out = coco.root / "out"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    shutil.rmtree(out / "index")
    for name in ("manifest.json", "source.json"):
        (out / name).unlink()
    again = index(out, categories=coco.annotations)
    assert again.digest == manifest.digest
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    shutil.rmtree(out / "index")
    (out / "manifest.json").unlink()
    alone = index(out)  # with only source.json
    assert alone.files == manifest.files
    assert alone.categories == manifest.categories


def test_a_coco_file_of_other_images_gives_only_categories(coco):
    coco.write()
    out = coco.root / "out"
    for image in coco.data["images"]:
        image["id"] += 1000
    for annotation in coco.data["annotations"]:
        annotation["image_id"] += 1000
    coco.annotations.write_text(json.dumps(coco.data))
    for name in ("manifest.json", "source.json"):
        (out / name).unlink()
    assert index(out, categories=coco.annotations).name == "out"


def test_an_existing_source_json_is_kept(coco):
    coco.write()
    path = coco.root / "out" / "source.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()), indent=4))
    before = path.read_bytes()
    (coco.root / "out" / "manifest.json").unlink()
    index(coco.root / "out")
    assert path.read_bytes() == before


def test_tars_in_a_remote_store_are_indexed_there(tars, names):
    local = index(tars, categories=names)
    store = fsspec.filesystem("memory")
    for name in ("a.tar", "b.tar"):
        store.pipe_file(f"/{tars.parent.name}/tars/{name}", (tars / name).read_bytes())
    url = f"memory://{tars.parent.name}/tars"
    manifest = index(url, categories=names)
    assert manifest.digest == local.digest
    assert verify(url).ok
    assert [sample.image_id for sample in read_samples(manifest, [2, 0])] == [3, 1]
    with pytest.raises(ShardError, match="is a data set already"):
        index(url, categories=names)
    store.rm(f"/{tars.parent.name}/tars/manifest.json")
    store.pipe_file(f"/{tars.parent.name}/tars/c.tar", (tars / "a.tar").read_bytes())
    with pytest.raises(SourceError, match=f"^{url}: 4 defects: a.tar: sample one: its key is that of 2 samples"):
        index(url, categories=names)
    assert store.exists(f"/{tars.parent.name}/tars.report.json")
    store.rm(f"/{tars.parent.name}", recursive=True)
