import gc
import io
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.config import ReadConfig
from shards.errors import ShardError
from shards.plan.epoch import plan_epoch
from shards.read.loader import open_batches, open_loader, read_samples
from shards.read.sample import decode
from shards.store import range_reader, storage
from tests.support.reading import reading_threads


def ids(sample):
    return sample.image_id, sample.epoch


def load(manifest, plan, **arguments):
    return open_loader(manifest, plan, **({"transform": ids, "collate": list} | arguments))


def planned(manifest, plan, step, rank=0, world_size=1):
    rows, epochs = plan.step(step, rank, world_size)
    return list(zip(manifest.index().images["image_id"][rows].tolist(), epochs.tolist(), strict=True))


def open_below(folder):
    """Return the names of the files in a folder that this process has open."""
    links = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            links.append(link.readlink())
    return [path.name for path in links if path.parent == folder]


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_every_rank_gets_batches_in_the_order_of_the_plan(coco, threads):
    manifest = coco.write(samples_per_shard=3)
    plan = plan_epoch(manifest, seed=1, epoch=1, batch_size=4, epochs=3)
    for world_size in (1, 2, 3):
        for rank in range(world_size):
            loader = load(manifest, plan, rank=rank, world_size=world_size, config=ReadConfig(threads))
            expected = [
                planned(manifest, plan, step, rank, world_size) for step in range(plan.first_step, plan.end_step)
            ]
            assert list(loader) == expected


def test_a_loader_can_start_at_any_step(coco):
    manifest = coco.write()
    plan = plan_epoch(manifest, seed=1, epoch=0, batch_size=2)
    whole = list(load(manifest, plan))
    for step in range(plan.end_step + 1):
        assert list(load(manifest, plan, start_step=step)) == whole[step:]


def test_a_rank_without_samples_gets_an_empty_batch(coco):
    manifest = coco.write()
    plan = plan_epoch(manifest, seed=1, epoch=0, batch_size=3, epochs=1)
    assert list(load(manifest, plan, rank=0, world_size=4))[-1] == []


def test_a_sample_has_the_image_and_its_non_crowd_annotations(coco):
    manifest = coco.write()
    (sample,) = read_samples(manifest, manifest.index().rows_of([100]))
    with Image.open(coco.images / "picture 0.jpg") as image:
        assert np.array_equal(sample.image, np.asarray(image))
    assert sample.image.dtype == np.uint8
    assert sample.image.flags.writeable
    assert (sample.image_id, sample.width, sample.height, sample.epoch) == (100, 40, 64, 0)
    np.testing.assert_allclose(sample.boxes_xyxy, [[1.5, 2.25, 21.6, 32.95], [5, 5, 17.5, 5]], rtol=1e-6)
    assert sample.boxes_xyxy.dtype == np.float32
    assert sample.labels.tolist() == [2, 0]
    assert sample.labels.dtype == np.int64
    assert manifest.index().annotations[sample.annotations]["annotation_id"].tolist() == [11, 13]


def test_an_image_without_annotations_has_empty_columns(coco):
    manifest = coco.write()
    (sample,) = read_samples(manifest, manifest.index().rows_of([121]))
    assert sample.boxes_xyxy.shape == (0, 4)
    assert sample.labels.shape == sample.annotations.shape == (0,)


def test_grey_and_cmyk_become_rgb_and_exif_rotation_is_ignored(coco):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to display
    with Image.open(coco.images / "picture 5.jpg") as image:
        image.load()
    image.save(coco.images / "picture 5.jpg", exif=exif)
    manifest = coco.write()
    grey, cmyk, rotated = read_samples(manifest, manifest.index().rows_of([107, 114, 135]))
    assert (grey.image[..., 0] == grey.image[..., 2]).all()
    for sample in (grey, cmyk, rotated):
        assert sample.image.shape == (sample.height, sample.width, 3)


def test_no_more_than_prefetch_batches_exist_at_once(coco):
    manifest = coco.write()
    made = []
    batches = [np.array([number % 7]) for number in range(40)]
    loader = open_batches(
        manifest, batches, transform=ids, collate=made.append, config=ReadConfig(threads=4, prefetch=3)
    )
    for taken, _ in enumerate(loader, start=1):
        assert len(made) < taken + 3
    assert len(made) == 40


def test_closing_a_loader_early_ends_its_threads(coco):
    manifest = coco.write()
    loader = open_batches(manifest, [np.arange(7)] * 50, transform=ids, collate=list)
    next(loader)
    assert reading_threads()
    loader.close()
    assert not reading_threads()
    loader = open_batches(manifest, [np.arange(7)] * 50, transform=ids, collate=list)
    next(loader)
    del loader
    gc.collect()
    assert not reading_threads()


def test_impossible_arguments_are_refused_before_reading(coco):
    manifest = coco.write()
    plan = plan_epoch(manifest, seed=1, epoch=1, batch_size=4)
    with pytest.raises(ShardError, match="got rank 2 of 2"):
        load(manifest, plan, rank=2, world_size=2)
    with pytest.raises(ShardError, match=r"got start_step 1, expected 2..4"):
        load(manifest, plan, start_step=1)
    with pytest.raises(ShardError, match="got threads 2 and prefetch 0"):
        ReadConfig(prefetch=0)
    coco.data["images"].pop(3)
    with pytest.raises(ShardError, match="got a plan for 7 images, expected one for this data set's 6"):
        load(coco.write("other"), plan)


def test_the_number_of_open_files_is_bounded(coco, monkeypatch):
    monkeypatch.setattr(range_reader, "OPEN_FILES", 2)
    manifest = coco.write(samples_per_shard=1)
    order = np.random.default_rng(0).integers(0, 7, 100)
    found = [sample.row for sample in read_samples(manifest, order, ReadConfig(threads=4, prefetch=8))]
    assert found == order.tolist()
    files = range_reader.RangeReader()
    for shard in manifest.shards:
        files.read(storage.join(manifest.url, shard.name), 0, 1)
    assert sorted(open_below(coco.root / "out")) == [shard.name for shard in manifest.shards[-2:]]
    files.close()
    assert open_below(coco.root / "out") == []


def test_closing_a_loader_cancels_pending_batches(coco):
    manifest = coco.write()
    started = []

    def transform(sample):
        started.append(sample.row)
        time.sleep(0.02)

    config = ReadConfig(threads=1, prefetch=30)
    loader = open_batches(
        manifest, [np.array([number % 7]) for number in range(40)], transform=transform, collate=list, config=config
    )
    next(loader)
    loader.close()
    assert len(started) < 15


def test_a_data_set_can_be_read_from_a_remote_url(coco):
    import fsspec

    from shards.dataset.manifest import load_manifest
    from shards.dataset.verify import verify

    local = coco.write(samples_per_shard=3)
    memory = fsspec.filesystem("memory")
    memory.put(str(coco.root / "out"), "/sets/coco", recursive=True)
    remote = load_manifest("memory://sets/coco")
    assert remote.digest == local.digest
    for ours, theirs in zip(read_samples(remote, range(7)), read_samples(local, range(7)), strict=True):
        assert np.array_equal(ours.image, theirs.image)
    assert verify("memory://sets/coco").ok
    memory.pipe_file("/sets/coco/shard-000001.tar", io.BytesIO(b"short").getvalue())
    assert not verify("memory://sets/coco").ok


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2, "progressive": True}])
def test_jpegs_decode_to_the_same_pixels_as_with_pillow(mode, options):
    y, x = np.mgrid[:57, :83]
    waves = np.stack([127 + 120 * np.sin(x / 9 + y / 5 + phase) for phase in range(3)], axis=-1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(waves).convert(mode).save(file, "JPEG", **options)
    pixels = decode(file.getvalue())
    assert pixels.flags.writeable
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(file).convert("RGB")))


def test_image_and_masks_are_read_with_one_request(coco, monkeypatch):
    for annotation in coco.data["annotations"]:
        annotation["segmentation"] = [[2, 2, 20, 2, 20, 20, 2, 20]]
    manifest = coco.write()
    requests = []
    read = range_reader.RangeReader.read

    def record_and_read(*arguments):
        requests.append(arguments)
        return read(*arguments)

    monkeypatch.setattr(range_reader.RangeReader, "read", record_and_read)
    samples = list(read_samples(manifest, range(7), ReadConfig(0, masks=True)))
    assert sum(int(sample.masks.sum()) for sample in samples) > 300
    assert len(requests) == 7
