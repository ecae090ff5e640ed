import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import fsspec
import msgspec
import numpy as np
import pytest

from shards.config import CacheConfig
from shards.dataset.index import ANNOTATION_DTYPE, IMAGE_DTYPE
from shards.dataset.manifest import load_index, load_manifest
from shards.errors import ShardError
from shards.store import storage


def edit(folder: Path, **fields: object) -> None:
    path = folder / "manifest.json"
    path.write_bytes(msgspec.json.encode(msgspec.json.decode(path.read_bytes()) | fields))


def test_written_manifest_is_read_back(coco):
    written = coco.write()
    read = load_manifest(coco.root / "out")
    assert read == written
    assert read.digest == written.digest
    assert load_manifest(coco.root / "out" / "manifest.json") == written


def test_labels_are_positions_in_ascending_category_ids(coco):
    manifest = coco.write()
    assert [(category.id, category.name) for category in manifest.categories] == [
        (3, "car"),
        (7, "train"),
        (90, "toothbrush"),
    ]
    index = manifest.index()
    row = int(index.rows_of([100])[0])
    assert index.annotations_of(row)["label"].tolist() == [2, 0, 1]


def test_digest_does_not_depend_on_the_folder(coco):
    first = coco.write()
    (coco.root / "out").rename(coco.root / "elsewhere")
    moved = load_manifest(coco.root / "elsewhere")
    assert moved.url != first.url
    assert moved.digest == first.digest


def test_equal_manifests_share_one_index_and_pickle_without_it(coco):
    manifest = coco.write()
    index, digest = manifest.index(), manifest.digest
    assert load_manifest(coco.root / "out").index() is index
    sent = pickle.loads(pickle.dumps(manifest))  # noqa: S301
    assert sent == manifest
    assert not sent.__dict__
    assert sent.digest == digest


def test_relative_path_works_in_another_working_directory(coco, monkeypatch):
    coco.write()
    monkeypatch.chdir(coco.root)
    manifest = load_manifest("out")
    monkeypatch.chdir("/")
    assert len(load_index(manifest).images) == 7


def test_the_index_of_the_largest_coco_stays_small():
    assert 118_287 * IMAGE_DTYPE.itemsize + 860_001 * ANNOTATION_DTYPE.itemsize < 60e6


def test_max_boxes_does_not_count_crowds(coco):
    index = coco.write().index()
    assert index.max_boxes == 2
    assert index.boxes_per_image.sum() == 8


def test_a_data_set_without_annotations_is_one(coco):
    coco.data["annotations"] = []
    index = coco.write().index()
    assert index.max_boxes == 0
    assert len(index.annotations_of(3)) == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"colour": "blue"}, "unknown field `colour`"),
        ({"images": "7"}, r"\$.images"),
        ({"shards": [{"name": "a.tar", "samples": 7, "bytes": "many", "sha256": ""}]}, r"\$.shards\[0\].bytes"),
        ({"format": 1}, "got format 1, expected 2: write the data set again"),
        ({"images": 8}, "the shards hold 7 samples, not 8"),
        ({"categories": [{"id": 2, "name": "a"}, {"id": 1, "name": "b"}]}, "not ascending"),
        ({"shards": [{"name": "../../etc/shadow", "samples": 7, "bytes": 1, "sha256": ""}]}, "leave the data set"),
        ({"shards": [{"name": "a/b.tar", "samples": 7, "bytes": 1, "sha256": ""}]}, "not plain file names: 'a/b.tar'"),
        ({"shards": [{"name": ".", "samples": 7, "bytes": 1, "sha256": ""}]}, "not plain file names"),
        (
            {"shards": [{"name": f"{n}.tar", "samples": n, "bytes": 1, "sha256": ""} for n in (-1, 8)]},
            "a negative number of samples or bytes",
        ),
        ({"url": "s3://elsewhere"}, "own url"),
    ],
)
def test_impossible_manifest_is_refused_in_one_line(coco, fields, message):
    coco.write()
    edit(coco.root / "out", **fields)
    with pytest.raises(ShardError, match=message) as caught:
        load_manifest(coco.root / "out")
    assert "manifest.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_error_for_a_missing_manifest_names_the_command(tmp_path):
    with pytest.raises(ShardError, match="detr shard coco"):
        load_manifest(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(ShardError, match="detr shard coco"):
        load_manifest(tmp_path / "file")


def test_a_url_that_cannot_be_reached_gets_one_clear_line():
    with pytest.raises(ShardError, match="cannot be reached: Protocol not known: nowhere"):
        load_manifest("nowhere://bucket/coco")


def test_a_changed_index_is_noticed_when_it_is_loaded(coco):
    manifest = coco.write()
    path = coco.root / "out" / "index" / "annotations.npy"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    with pytest.raises(ShardError, match=r"annotations.npy: its sha256 is not the manifest's"):
        load_index(manifest)
    path.unlink()
    with pytest.raises(ShardError, match=r"annotations.npy: no such file"):
        load_index(manifest)


def test_rows_of_finds_every_image_and_names_an_unknown_one(coco):
    index = coco.write().index()
    ids = index.images["image_id"]
    assert index.rows_of(ids[::-1]).tolist() == list(range(len(ids)))[::-1]
    assert index.rows_of(np.zeros(0, np.int64)).tolist() == []
    with pytest.raises(ShardError, match="image id 101 is not"):
        index.rows_of([100, 101])


def test_the_index_is_mapped_and_read_only(coco):
    index = coco.write().index()
    assert isinstance(index.images, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        index.images["width"][0] = 1


def test_reading_needs_neither_torch_nor_webdataset():
    code = (
        "import sys, shards; shards.load_manifest, shards.plan_epoch, shards.open_loader, shards.coco_metrics;"
        "sys.exit(bool({'torch', 'webdataset', 'sklearn', 'pycocotools'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_importing_the_package_imports_nothing():
    code = "import sys, shards; sys.exit(bool({'numpy', 'msgspec', 'fsspec'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_exists():
    import shards

    assert all(getattr(shards, name) is not None for name in shards.__all__)
    with pytest.raises(AttributeError, match="no attribute 'shuffle'"):
        shards.shuffle  # noqa: B018


@pytest.mark.parametrize(("error", "kind"), [(OSError("away"), OSError), (PermissionError("no"), ShardError)])
def test_an_error_that_may_pass_is_not_the_data_sets_fault(coco, monkeypatch, error, kind):
    manifest = coco.write()

    def fails(url):
        raise error

    monkeypatch.setattr(storage, "read", fails)
    for look in (lambda: load_manifest(manifest.url), lambda: load_index(manifest)):
        with pytest.raises(kind, match="cannot be read") as caught:
            look()
        assert manifest.url in str(caught.value)
        assert isinstance(caught.value, ShardError) == (kind is ShardError)


def test_uncached_index_is_used_as_it_was_checked(coco, monkeypatch):
    written = coco.write()
    fsspec.filesystem("memory").put(str(coco.root / "out"), "/checked/coco", recursive=True)
    read, asked = storage.read, Counter()

    def reading(url):
        asked[url] += 1
        content = bytearray(read(url))
        if asked[url] > 1:
            content[-40] ^= 1  # on its way
        return bytes(content)

    monkeypatch.setattr(storage, "read", reading)
    remote = load_manifest("memory://checked/coco", CacheConfig("off"))
    assert np.array_equal(load_index(remote).images, written.index().images)
    assert set(asked.values()) == {1}
