"""Reports at the start of a run: the first batch and the contents of the data."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config import RunConfig
from pipeline.data.loader import global_batch
from pipeline.display.batches import BatchView, batch_digest
from pipeline.distributed.ranks import Ranks
from pipeline.schedule import Schedule
from pipeline.tracking.tags import TAG_DATA
from pipeline.training import first_minute
from pipeline.training.first_minute import report_contents
from pipeline.training.loop import run
from pipeline.training.state import RunInfo
from shards.config import WriteConfig
from shards.dataset.manifest import load_manifest
from shards.synthetic import write_synthetic
from shards.write.writer import write_coco
from tests.support.runs import Kill, KillingTracker, start
from tests.support.tracker import MemoryTracker


@pytest.fixture
def short(config: RunConfig) -> RunConfig:
    evaluate = replace(config.evaluate, explain=False, pictures=0)
    return replace(config, optim=replace(config.optim, max_steps=2), evaluate=evaluate)


def test_a_run_reports_its_first_batch_and_the_data_once(short: RunConfig, tmp_path: Path) -> None:
    run_info = start(short, tmp_path / "run")
    first = KillingTracker("train", 1)
    with pytest.raises(Kill):
        run(short, run_info, Ranks(), first)
    again = MemoryTracker()
    run(short, run_info, Ranks(), again)
    assert {("data/first_batch", 0), ("data/contents", 0)} <= set(again.pictures)
    table = again.tables["first_batch.json"]
    assert table["images"] == [4]
    assert len(again.tables["data_contents.json"]["group"]) == 8 + 7 + 4
    # Continued from a later step, it is not the first minute any more.
    later = MemoryTracker()
    run(replace(short, optim=replace(short.optim, max_steps=4)), run_info, Ranks(), later)
    assert not [key for key, _ in later.pictures if key.startswith("data/")]


def test_a_run_continues_without_a_batch_that_cannot_be_shown(
    short: RunConfig, run_info: RunInfo, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no batch\nat all")

    monkeypatch.setattr(first_minute, "global_batch", fail)
    tracker = MemoryTracker()
    with caplog.at_level(logging.WARNING):
        run(short, run_info, Ranks(), tracker)
    assert [step for name, _, step in tracker.points if name == "train/loss"] == [1, 2]
    assert "are not reported (no batch)" in caplog.text


def test_data_that_differ_are_a_warning_of_the_run(tmp_path: Path) -> None:
    """Squares and crosses are missing from one of the data sets."""
    made = write_synthetic(tmp_path / "coco", train=40, val=40, size=64)
    manifests = []
    for name, split in (("train", made.train), ("val", made.val)):
        write_coco(split.images, split.annotations, tmp_path / name, WriteConfig())
        manifests.append(load_manifest(str(tmp_path / name)))
    train, val = manifests
    tracker = MemoryTracker()
    report_contents(tracker, train, val)
    assert TAG_DATA not in tracker.last_tags
    annotations = np.array(val.index().annotations)
    annotations["label"] = 0
    val.__dict__["_index"] = replace(val.index(), annotations=annotations)
    report_contents(tracker, train, val)
    assert "3 classes (square, triangle, cross) are only in the training data" in tracker.last_tags[TAG_DATA]
    assert "differ in the classes of objects" in tracker.last_tags[TAG_DATA]


def test_the_picture_shows_the_pixels_after_normalisation_padding_and_boxes(config: RunConfig) -> None:
    manifest = load_manifest(config.data.train)
    # Images of two sizes, so that some are padded.
    schedule = Schedule(config.optim, manifest.images)
    (batch,) = next(global_batch(manifest, config, schedule, 0, 1))
    assert batch.padding is not None
    view = BatchView(config.transform, [category.name for category in manifest.categories])
    assert view.add_all([(batch,)])
    assert view.columns["sha256"] == [batch_digest(batch)]
    assert view.columns["padding"][0] == pytest.approx(float(batch.padding.float().mean()), abs=1e-4)
    picture = np.asarray(view.picture(), np.int64)
    tile = picture[18 : 18 + 320, :320]
    small = next(number for number, size in enumerate(batch.sizes) if size != batch.images.shape[2:])
    row, column = divmod(small, 2)
    top, left = row * (320 + 18) + 18, column * 328
    tile = picture[top : top + 320, left : left + 320]
    height, width = batch.images.shape[2:]
    # Padding is 0 after normalisation, so the eye sees the mean colour there.
    mean = np.round(np.array(config.transform.mean) * 255)
    corner = tile[-3, -3]
    assert np.abs(corner - mean).max() <= 1
    original = Image.fromarray(batch.images[small].permute(1, 2, 0).contiguous().numpy()).resize(
        (320, 320 * height // width)
    )
    inside = batch.sizes[small][0] * 320 // height - 4
    same = np.abs(tile[:inside, :inside] - np.asarray(original, np.int64)[:inside, :inside]).max(axis=2) <= 2
    assert 0.3 < same.mean() < 0.99  # all but padding, boxes and names


def test_drawing_stops_when_the_run_does(config: RunConfig) -> None:
    manifest = load_manifest(config.data.train)
    ranks = global_batch(manifest, config, Schedule(config.optim, manifest.images), 0, 2)
    assert not BatchView(config.transform, ["a", "b", "c", "d"]).add_all(ranks, lambda: True)
    ranks.close()
