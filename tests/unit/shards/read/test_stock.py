import json
import subprocess
import sys
import zlib

import fsspec
import pytest
from torch.utils.data import DataLoader

from shards.config import CacheConfig, IndexConfig
from shards.dataset.manifest import load_manifest
from shards.errors import ShardError
from shards.foreign.index_tars import index_tars
from shards.read.stock import open_webdataset, verify_stock
from tests.support.foreign_tars import picture, tar, thing
from tests.support.panoptic_data import make_panoptic


@pytest.fixture
def written(coco):
    return coco.write(samples_per_shard=3)


def problems(coco) -> list[str]:
    report = verify_stock(coco.root / "out")
    assert not any("\n" in problem for problem in report.problems)
    return list(report.problems)


def replace(path, old: bytes, new: bytes, start: int = 0):
    content = path.read_bytes()
    position = content.index(old, start)
    path.write_bytes(content[:position] + new + content[position + len(old) :])


def image_id(sample) -> int:
    return json.loads(sample["json"])["image"]["id"]


def test_importing_the_module_imports_no_torch():
    code = "import shards.read.stock, sys; sys.exit('torch' in sys.modules or 'webdataset' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_pipeline_delivers_every_sample_undecoded(coco, written):
    index = written.index()
    samples = list(open_webdataset(coco.root / "out"))
    assert [image_id(sample) for sample in samples] == index.images["image_id"].tolist()
    for row, sample in enumerate(samples):
        image = sample["png" if "png" in sample else "jpg"]
        assert zlib.crc32(image) == index.images["crc32"][row]
        ids = [annotation["id"] for annotation in json.loads(sample["json"])["annotations"]]
        assert ids == index.annotations_of(row)["annotation_id"].tolist()
        assert ("segmentation.json" in sample) == bool(index.images["text_length"][row])


def test_stock_stages_and_options_apply(coco, written):
    dataset = open_webdataset(coco.root / "out", shardshuffle=3, seed=1, nodesplitter=None).decode("rgb8")
    pictures = [picture for (picture,) in dataset.to_tuple("jpg;png").shuffle(4)]
    assert sorted(picture.shape for picture in pictures) == [(64 - 5 * n, 40 + 3 * n, 3) for n in range(6, -1, -1)]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_loader_workers_divide_the_shards(coco, written, start):
    dataset = open_webdataset(coco.root / "out").map(image_id)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=start)
    assert sorted(loader) == sorted(written.index().images["image_id"].tolist())


@pytest.mark.parametrize("folder", ["", "off"])
def test_remote_shards_are_read_through_fsspec(coco, written, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DETR_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    memory.put(str(coco.root / "out"), "/stock", recursive=True)
    try:
        samples = list(open_webdataset("memory://stock", CacheConfig(folder=folder)))
        assert verify_stock("memory://stock").ok
        memory.rm("/stock/shard-000001.tar")
        (problem,) = verify_stock("memory://stock").problems
    finally:
        memory.rm("/stock", recursive=True)
    assert [image_id(sample) for sample in samples] == written.index().images["image_id"].tolist()
    cached = {path.name for path in (tmp_path / "cache").glob("*")} & {shard.sha256 for shard in written.shards}
    assert len(cached) == (0 if folder == "off" else 3)
    assert problem.startswith("memory://stock/shard-000001.tar: no such file")


def test_without_a_data_set_there_is_no_pipeline(tmp_path):
    with pytest.raises(ShardError, match=r"no manifest\.json here"):
        open_webdataset(tmp_path)


def test_a_sound_data_set_has_no_problems(coco, written):
    calls = []
    report = verify_stock(coco.root / "out", lambda *call: calls.append(call))
    assert report.ok
    assert (report.images, report.shards, report.bytes) == (7, 3, sum(shard.bytes for shard in written.shards))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_a_corrupt_image_is_named(coco, written):
    record = written.index().images[4]
    path = coco.root / "out" / "shard-000001.tar"
    content = path.read_bytes()
    start = record["offset"] + 30
    path.write_bytes(content[:start] + bytes([content[start] ^ 16]) + content[start + 1 :])
    (problem,) = problems(coco)
    assert problem.startswith(f"{path}: through webdataset, images of 1 of its 3 samples are missing or differ")
    assert f"such as image {record['image_id']}:" in problem


def test_a_missing_sample_is_named(coco, written):
    record = written.index().images[3]
    key = f"{record['image_id']:012d}".encode()
    path = coco.root / "out" / "shard-000001.tar"
    size = path.stat().st_size
    content = path.read_bytes()
    end = content.rindex(key)
    second = content.index(f"{written.index().images[4]['image_id']:012d}.".encode(), end)
    path.write_bytes(content[second:])  # all members of the shard's first sample are gone
    assert path.stat().st_size < size
    (problem,) = problems(coco)
    assert (
        f"images of 1 of its 3 samples are missing or differ from the index, such as image {record['image_id']}:"
        in (problem)
    )


def test_changed_annotation_ids_and_segmentations_are_named(coco, written):
    row = int((written.index().images["count"] == 2).argmax())
    record = written.index().images[row]
    path = coco.root / "out" / written.shards[record["shard"]].name
    replace(path, b'"id":18', b'"id":81', int(record["offset"]))
    replace(path, b"1.5", b"2.5", int(record["text_offset"]))
    text, annotations = problems(coco)
    assert f"segmentations of 1 of its {written.shards[record['shard']].samples} samples" in text
    assert "annotations of 1 of its" in annotations
    assert all(f"such as image {record['image_id']}:" in problem for problem in (text, annotations))


def test_truncated_and_missing_shards_are_named(coco, written):
    first, second = (coco.root / "out" / shard.name for shard in written.shards[:2])
    first.write_bytes(first.read_bytes()[:2000])
    second.unlink()
    cut, absent = problems(coco)
    assert cut == f"{first}: webdataset cannot read it: unexpected end of data: copy it again"
    assert absent.startswith(f"{second}: no such file; the manifest lists it")


def test_foreign_tars_are_read_without_their_pickles(tars, names):
    tar(
        tars / "c.tar",
        ("four.jpg", picture()),
        ("four.json", {"annotations": [thing(1, 1, 2, 2)]}),
        ("four.pickle", b"not a pickle"),
        ("four.pth", b"not a tensor"),
    )
    index_tars(tars, IndexConfig(names))
    assert verify_stock(tars).ok
    samples = {sample["__key__"]: sample for sample in open_webdataset(tars).decode("rgb8")}
    assert len(samples) == load_manifest(tars).images == 4
    assert {key for key in samples["four"] if not key.startswith("__")} == {"jpg", "json"}


def test_pngs_of_segments_are_delivered_and_verified(tmp_path):
    source = make_panoptic(tmp_path)
    manifest = source.write()
    samples = list(open_webdataset(manifest.url))
    assert {sample["segments.png"] for sample in samples} == {path.read_bytes() for path in source.segments.iterdir()}
    assert verify_stock(manifest.url).ok
    path = tmp_path / "out" / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    content[int(manifest.index().images["text_offset"][0]) + 60] ^= 1
    path.write_bytes(content)
    (problem,) = verify_stock(manifest.url).problems
    assert "panoptic PNGs of 1 of its 3 samples" in problem
