import fcntl
import io
import json
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.config import WriteConfig
from shards.dataset.manifest import IMAGES_NAME
from shards.errors import ShardError
from shards.write import shard as shard_writer
from shards.write import writer
from shards.write.writer import write_coco


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def members(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    return found


def test_everything_of_the_json_and_the_images_is_in_the_tars(coco):
    coco.write(samples_per_shard=3)
    files = members(coco.root / "out")
    rest = json.loads((coco.root / "out" / "source.json").read_bytes())
    assert rest == {key: coco.data[key] for key in ("info", "categories")}
    for image in coco.data["images"]:
        key = f"{image['id']:012d}"
        sample = json.loads(files[f"{key}.json"])
        segmentations = json.loads(files.get(f"{key}.segmentation.json", b"[]"))
        for annotation, segmentation in zip(sample["annotations"], segmentations, strict=True):
            annotation["segmentation"] = segmentation
        assert sample["image"] == image
        assert sample["annotations"] == [
            annotation for annotation in coco.data["annotations"] if annotation["image_id"] == image["id"]
        ]
        encoded = files[key + Path(image["file_name"]).suffix]
        assert encoded == (coco.images / image["file_name"]).read_bytes()
    assert len(files) == 3 * len(coco.data["images"]) - 1  # image 121 has no annotations


def test_the_bytes_do_not_depend_on_the_workers_or_the_run(coco):
    coco.write("one", samples_per_shard=2)
    coco.write("two", samples_per_shard=2, workers=3)
    assert content(coco.root / "one") == content(coco.root / "two")


def test_tar_headers_contain_no_user_and_no_time(coco):
    coco.write()
    with tarfile.open(coco.root / "out" / "shard-000000.tar") as tar:
        heads = {(member.mtime, member.uid, member.gid, member.uname, member.gname, member.mode) for member in tar}
    assert heads == {(0, 0, 0, "root", "root", 0o444)}


def test_images_are_spread_over_shards_of_the_size_asked_for(coco):
    manifest = coco.write(samples_per_shard=3)
    assert [shard.samples for shard in manifest.shards] == [3, 3, 1]
    assert manifest.index().images["image_id"].tolist() != sorted(image["id"] for image in coco.data["images"])


def test_the_extension_is_the_contents_not_the_names(coco):
    Image.new("RGB", (40, 64)).save(coco.images / "picture 0.jpg", format="PNG")
    coco.write()
    assert "000000000100.png" in members(coco.root / "out")


def test_the_index_points_at_the_images_bytes(coco):
    manifest = coco.write(samples_per_shard=3)
    for record in manifest.index().images:
        path = coco.root / "out" / manifest.shards[record["shard"]].name
        encoded = path.read_bytes()[record["offset"] :][: record["length"]]
        with Image.open(io.BytesIO(encoded)) as image:
            assert image.size == (record["width"], record["height"])
        assert zlib.crc32(encoded) == record["crc32"]


def test_index_points_at_segmentations_or_has_length_0(coco):
    for annotation in coco.data["annotations"]:
        if annotation["image_id"] == 142:
            del annotation["segmentation"]
    manifest = coco.write(samples_per_shard=3)
    files = members(coco.root / "out")
    absent = set()
    for record in manifest.index().images:
        content = (coco.root / "out" / manifest.shards[record["shard"]].name).read_bytes()
        text = content[record["text_offset"] :][: record["text_length"]]
        assert text == files.get(f"{record['image_id']:012d}.segmentation.json", b"")
        assert zlib.crc32(text) == record["text_crc32"]
        absent |= {int(record["image_id"])} if not text else set()
    assert absent == {121, 142}


def test_images_in_subfolders_work(coco):
    (coco.images / "a" / "b").mkdir(parents=True)
    (coco.images / "picture 0.jpg").rename(coco.images / "a" / "b" / "0.jpg")
    coco.data["images"][0]["file_name"] = "a/b/0.jpg"
    assert coco.write().images == 7


@pytest.mark.parametrize("workers", [0, 2])
def test_progress_counts_up_to_every_image(coco, workers):
    coco.write("unused")
    calls = []
    config = WriteConfig(2, workers=workers)
    write_coco(coco.images, coco.annotations, coco.root / "out", config, lambda *call: calls.append(call))
    done = [images for images, total in calls]
    assert done == sorted(set(done))
    assert done == list(range(1, 8)) or workers
    assert calls[-1] == (7, 7)


def test_a_rerun_leaves_a_finished_data_set_as_it_is(coco):
    first = coco.write(samples_per_shard=3)
    before = {path: path.stat().st_mtime_ns for path in (coco.root / "out").rglob("*")}
    assert coco.write(samples_per_shard=3, workers=2) == first
    assert {path: path.stat().st_mtime_ns for path in (coco.root / "out").rglob("*")} == before


OTHERS = {
    "annotations": "already holds another data set .* made of an annotation file of other content",
    "limit": "already holds another data set .* made of the same file; this one would be instances-first-5",
    "shard size": "already holds instances, but written with --samples-per-shard 3, not 2",
    "image": "an image is not as in .*images now, such as image 100:",
    "lost image": "an image is not as in .*images now, such as image 100:",
    "lost shard": r"its shard-000001.tar is missing: copy it back, or delete",
    "cut shards": r"its shard-000000.tar has 5 bytes, not \d+ \(and 1 more of its files are missing or incomplete\): copy it back",
    "lost report": r"its report.json is missing: copy it back",
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_and_damaged_data_sets_are_never_overwritten(coco, other):
    coco.write(samples_per_shard=3)
    if other == "annotations":
        coco.data["annotations"].pop()
    elif other == "image":
        Image.new("RGB", (40, 64)).save(coco.images / "picture 0.jpg")
    elif other == "lost image":
        (coco.images / "picture 0.jpg").unlink()
    elif other == "lost shard":
        (coco.root / "out" / "shard-000001.tar").unlink()
    elif other == "cut shards":
        for number in range(2):
            (coco.root / "out" / f"shard-00000{number}.tar").write_bytes(b"short")
    elif other == "lost report":
        (coco.root / "out" / "report.json").unlink()
    before = content(coco.root / "out")
    with pytest.raises(ShardError, match=OTHERS[other]) as caught:
        coco.write(samples_per_shard=2 if other == "shard size" else 3, limit=5 if other == "limit" else 0)
    assert "\n" not in str(caught.value)
    assert content(coco.root / "out") == before


def test_a_folder_with_other_things_and_a_file_are_refused(coco):
    (coco.root / "out").mkdir()
    (coco.root / "out" / "thesis.txt").write_text("dear")
    with pytest.raises(ShardError, match="is not empty and holds no data set"):
        coco.write()
    with pytest.raises(ShardError, match="is a file"):
        coco.write("instances.json")


def test_an_empty_folder_may_be_written(coco):
    (coco.root / "out").mkdir()
    assert coco.write().images == 7


def test_interrupted_run_publishes_nothing_and_can_continue(coco, monkeypatch):
    expected = coco.write("expected", samples_per_shard=2)
    calls = []

    def interrupt(done: int, total: int) -> None:
        calls.append(done)
        if done == 5:
            raise KeyboardInterrupt

    arguments = (coco.images, coco.annotations, coco.root / "out", WriteConfig(2, name="instances"))
    with pytest.raises(KeyboardInterrupt):
        write_coco(*arguments, interrupt)
    assert not (coco.root / "out").exists()

    read = []
    original = shard_writer.read_image
    monkeypatch.setattr(
        shard_writer, "read_image", lambda folder, image: read.append(image.name) or original(folder, image)
    )
    assert write_coco(*arguments).digest == expected.digest
    assert len(read) == 3  # two shards of two were finished
    assert content(coco.root / "out") == content(coco.root / "expected")
    assert not (coco.root / "out.partial").exists()


def test_leftovers_of_another_input_are_not_used(coco):
    (coco.root / "out.partial" / "index").mkdir(parents=True)
    (coco.root / "out.partial" / "shard-000000.tar").write_bytes(b"of something else")
    (coco.root / "out.partial" / ".partial").mkdir()
    (coco.root / "out.partial" / ".partial" / "key").write_text("of something else")
    coco.write("expected")
    coco.write()
    assert content(coco.root / "out") == content(coco.root / "expected")


def test_leftovers_with_another_shard_size_are_not_used(coco, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_rest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            coco.write(samples_per_shard=1)
    coco.write("expected", samples_per_shard=4)
    coco.write(samples_per_shard=4)
    assert content(coco.root / "out") == content(coco.root / "expected")


def test_shards_written_elsewhere_must_be_visible(coco):
    expected = coco.write("expected", samples_per_shard=2)
    places = coco.images, coco.annotations
    config, calls = WriteConfig(2, name="instances"), []
    manifest = write_coco(*places, coco.root / "out", config, lambda *call: calls.append(call), map=map)
    assert manifest.digest == expected.digest
    assert calls == [(2, 7), (4, 7), (6, 7), (7, 7)]

    def somewhere_else(function, jobs):
        for written in map(function, jobs):
            (coco.root / "lost.partial" / written.shard.name).unlink()
            yield written

    with pytest.raises(ShardError, match=r"4 shards that workers wrote are not visible here, .*shard-000000.tar"):
        write_coco(*places, coco.root / "lost", config, map=somewhere_else)
    assert not (coco.root / "lost").exists()


@pytest.mark.parametrize("change", ["truncated", "one bit", "image changed since"])
def test_damaged_leftover_is_written_again(coco, monkeypatch, change):
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_rest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            coco.write(samples_per_shard=4)
    (coco.root / "out.partial" / "index").mkdir()
    (coco.root / "out.partial" / "index" / ".images.npy.4242").write_text("half of an index")
    leftover = coco.root / "out.partial" / "shard-000000.tar"
    if change == "truncated":
        leftover.write_bytes(leftover.read_bytes()[:2000])
    elif change == "one bit":
        damaged = bytearray(leftover.read_bytes())
        damaged[5000] ^= 1
        leftover.write_bytes(damaged)
    else:
        path = coco.images / "picture 0.jpg"
        damaged = bytearray(path.read_bytes())
        assert damaged[6:10] == b"JFIF"
        damaged[15] += 1  # its density: of the same length, and still an image
        path.write_bytes(damaged)
    coco.write("expected", samples_per_shard=4)
    coco.write(samples_per_shard=4)
    assert content(coco.root / "out") == content(coco.root / "expected")


def test_two_writers_do_not_mix(coco):
    staging = coco.root / "out.partial"
    staging.mkdir()
    descriptor = os.open(staging, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(ShardError, match="another process is writing it"):
        coco.write()
    os.close(descriptor)
    assert coco.write().images == 7


def test_unwritable_folder_gets_one_clear_line(coco):
    with pytest.raises(ShardError, match="cannot be written") as caught:
        coco.write("instances.json/below")
    assert "\n" not in str(caught.value)


def test_impossible_settings_are_refused():
    with pytest.raises(ShardError, match="got --samples-per-shard 0, expected 1 or more"):
        WriteConfig(samples_per_shard=0)
    with pytest.raises(ShardError, match="got --workers -1, expected 0 or more"):
        WriteConfig(workers=-1)


def test_the_index_is_plain_numpy(coco):
    coco.write()
    assert np.load(coco.root / "out" / IMAGES_NAME, allow_pickle=False).shape == (7,)
