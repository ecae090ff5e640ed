"""The loop in one process on a tiny data set: evaluations, reports, and the weights that training changes."""

import json
import shutil
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

from detr.model import build_model
from pipeline.checkpoint import catalog
from pipeline.checkpoint import state as checkpoint_state
from pipeline.checkpoint.metadata import read_meta
from pipeline.config import RunConfig, from_json
from pipeline.distributed.ranks import Ranks
from pipeline.tracking.pages.pictures import CURVES, DETECTIONS, REPORT, newest
from pipeline.tracking.progress import read_progress
from pipeline.tracking.step_timer import PHASES
from pipeline.tracking.tracker import WORKERS
from pipeline.training.loop import run
from pipeline.training.model import build_trainable_model
from pipeline.training.state import RunInfo
from pipeline.training.step import RANDOMNESS
from shards.dataset.manifest import load_manifest
from shards.errors import ShardError
from shards.score.coco_eval import METRICS
from tests.support.runs import Kill, KillingTracker, assert_same, evaluated, start, weights
from tests.support.tracker import MemoryTracker


def trained_weights(config: RunConfig, folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the newest checkpoint of a partly frozen model."""
    model = build_trainable_model(config, 4)
    path = catalog.newest(folder)
    assert path is not None
    checkpoint_state.load_weights(path, model)
    return model.state_dict()


def test_a_run_saves_evaluates_and_reports_at_the_right_steps(config: RunConfig, run_info: RunInfo) -> None:
    tracker = MemoryTracker()
    run(config, run_info, Ranks(), tracker)
    assert [path.name[-1] for path in catalog.list_checkpoints(run_info.folder)] == ["2", "3", "4", "6"]
    assert evaluated(run_info.folder) == ["03", "06"]
    assert [step for name, _, step in tracker.points if name == "train/loss"] == [1, 2, 3, 4, 5, 6]
    assert [step for name, _, step in tracker.points if name == "val/AP"] == [3, 6]
    assert [step for _, step in tracker.checkpoints] == [3, 6]
    assert [step for name, step in tracker.pictures if name == DETECTIONS] == [3, 6]
    assert [step for name, step in tracker.pictures if name == CURVES] == [3, 6]
    # The newest is always at step 0, where the slider of MLflow opens.
    assert {tracker.files[newest(key)][1] for key in (DETECTIONS, CURVES)} == {6}
    assert len([name for name, _ in tracker.pictures if not name.startswith(("errors/", "data/"))]) == 4
    assert [step for name, _, step in tracker.points if name == "At_a_glance/loss"] == [1, 2, 3, 4, 5, 6]
    assert [step for name, _, step in tracker.points if name == "At_a_glance/AP"] == [3, 6]
    # MLflow sorts the sections of charts by name.
    sections = sorted({name.rpartition("/")[0] for name, _, _ in [*tracker.points, (WORKERS, 0.0, 0)]} - {""})
    assert (sections[0], sections[-1]) == ("At_a_glance", "workers")
    assert [step for name, step in tracker.pictures if name == "errors/worst_images"] == [3, 6]
    assert [step for name, step in tracker.pictures if name == "errors/attention"] == [3, 6]
    assert b"<h2>Attention</h2>" in tracker.files[REPORT][0]
    assert tracker.tables["per_class_ap.json"]["category_id"] == [1, 2, 3, 4]
    assert len(tracker.tables["precision_recall.json"]["recall"]) == 101
    rates = {step: value for name, value, step in tracker.points if name == "optim/lr"}
    assert rates == pytest.approx({1: 1e-3, 2: 1e-3, 3: 1e-3, 4: 1e-4, 5: 1e-4, 6: 1e-4})
    assert [value for name, value, _ in tracker.points if name == "epoch"][-1] == 2.0


def test_the_phases_of_steps_add_up_to_the_time_taken(config: RunConfig, run_info: RunInfo) -> None:
    config, tracker = replace(config, track=replace(config.track, log_every=2)), MemoryTracker()
    started = datetime.now(UTC).replace(microsecond=0)
    start_s = time.perf_counter()
    run(config, run_info, Ranks(), tracker)
    took_s = time.perf_counter() - start_s
    reported = {(name, step): value for name, value, step in tracker.points if name.startswith("step/")}
    assert {step for _, step in reported} == {2, 3, 4, 6}
    for step in (2, 3, 4, 6):
        parts = [reported[f"step/{phase}_s", step] for phase in PHASES]
        assert min(parts) >= 0
        assert sum(parts) == pytest.approx(reported["step/total_s", step])
        assert min(reported[f"step/{phase}_s", step] for phase in ("forward", "loss", "backward", "optimizer")) > 0
    # The interval that ends at step 4 began with the save of step 3, which waited for that of step 2 to be whole.
    assert reported["step/checkpoint_stall_s", 4] > 0
    steps = {2: 2, 3: 1, 4: 1, 6: 2}
    assert 0 < sum(reported["step/total_s", step] * count for step, count in steps.items()) < took_s
    progress = read_progress(tracker.last_tags)
    assert progress is not None
    assert progress.ends is not None
    assert (progress.step, progress.epoch) == (6, 2.0)
    # At the last step only an evaluation is left, which takes no longer than the run.
    assert started <= progress.ends <= datetime.now(UTC) + timedelta(seconds=took_s)


def test_a_run_with_masks_reports_their_losses_and_scores(masks_config: RunConfig, tmp_path: Path) -> None:
    run_info, tracker = start(masks_config, tmp_path / "run"), MemoryTracker()
    run(masks_config, run_info, Ranks(), tracker)
    points = {name: value for name, value, step in tracker.points if step == 3}
    defined = [name for name in METRICS if not name.endswith(("m", "l"))]  # the objects are small
    assert {f"val/mask_{name}" for name in defined} | {f"val/{name}" for name in defined} <= points.keys()
    assert min(value for name, value in points.items() if name.startswith("val/")) >= 0
    assert points["train/loss_mask"] > 0 < points["train/loss_dice"]
    assert len(tracker.tables["per_class_ap.json"]["mask_AP"]) == 4
    metrics = catalog.read_evaluation(catalog.folder_of(run_info.folder, 3))
    assert metrics is not None
    assert metrics["mask_AP"] == points["val/mask_AP"]
    assert len(tracker.tables["precision_recall.json"]["mask_precision"]) == 101
    assert sorted(picture for picture in tracker.pictures if not picture[0].startswith(("errors/", "data/"))) == [
        (name, 3) for name in (DETECTIONS, CURVES)
    ]


def test_training_the_mask_head_changes_it_alone(masks_config: RunConfig, tmp_path: Path) -> None:
    config = replace(masks_config, optim=replace(masks_config.optim, train="mask_head"))
    run_info = start(config, tmp_path / "run")
    torch.manual_seed(config.seed)
    before = build_model(config.model, 4).state_dict()
    run(config, run_info, Ranks(), None)
    after = weights(config, run_info.folder)
    changed = {name.split(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"bbox_attention", "mask_head"}
    untouched = [name for name in after if name.startswith("mask_head") and torch.equal(before[name], after[name])]
    assert untouched == []


def test_an_interrupted_mask_head_training_ends_with_the_same_weights(masks_config: RunConfig, tmp_path: Path) -> None:
    config = replace(
        masks_config,
        model=replace(masks_config.model, norm="batch"),
        optim=replace(masks_config.optim, train="mask_head"),
        checkpoint=replace(masks_config.checkpoint, every_steps=1, keep=9),
    )
    whole, parts = start(config, tmp_path / "whole"), start(config, tmp_path / "parts")
    run(config, whole, Ranks(), None)
    with pytest.raises(Kill):
        run(config, parts, Ranks(), KillingTracker("train", 2))
    run(config, parts, Ranks(), None)
    assert_same(trained_weights(config, whole.folder), trained_weights(config, parts.folder))


def test_training_changes_what_may_change_and_no_more(config: RunConfig, uninterrupted: Path) -> None:
    torch.manual_seed(config.seed)
    before = build_model(config.model, 4).state_dict()
    after = weights(config, uninterrupted)
    same = {name for name, value in before.items() if torch.equal(value, after[name])}
    body = "backbone.0.body."
    frozen = {name for name in before if name.startswith((body + "conv1", body + "bn1", body + "layer1"))}
    assert frozen <= same
    # What is left beside the frozen stages: biases whose gradient is zero by construction.
    assert not any(name.endswith("weight") for name in same - frozen if "norm" not in name)


def test_the_checkpoint_says_what_it_is_of(config: RunConfig, uninterrupted: Path) -> None:
    meta = read_meta(catalog.folder_of(uninterrupted, 4))
    assert (meta.step, meta.samples, meta.run_id) == (4, 16, "run")
    assert (meta.num_classes, meta.code_commit, meta.world_size) == (4, "commit", 1)
    assert meta.epoch == pytest.approx(16 / 12)
    assert (meta.val_digest, meta.total_steps) == (load_manifest(config.data.val).digest, 6)
    assert meta.lr_factor == pytest.approx(0.1)
    assert meta.randomness == RANDOMNESS
    assert meta.best is not None
    assert meta.best.step == 3
    assert from_json(json.dumps(meta.config)) == config
    assert (
        {"torch", "torchvision", "numpy", "webdataset", "mlflow", "ray", "detr-cluster"}
        >= meta.versions.keys()
        > {"torch"}
    )


def test_evaluations_come_every_so_many_epochs_and_at_the_end(config: RunConfig, run_info: RunInfo) -> None:
    longer = replace(
        config,
        optim=replace(config.optim, batch_size=12, epochs=3),
        evaluate=replace(config.evaluate, every=2),
        checkpoint=replace(config.checkpoint, every_steps=0),
    )
    run(longer, run_info, Ranks(), None)
    assert evaluated(run_info.folder) == ["02", "03"]


def test_a_batch_larger_than_the_data_set_still_trains(config: RunConfig, run_info: RunInfo) -> None:
    wide = replace(config, optim=replace(config.optim, batch_size=16, epochs=3))
    tracker = MemoryTracker()
    run(wide, run_info, Ranks(), tracker)  # three epochs are 36 samples; the third step is filled up from a fourth
    meta = read_meta(catalog.folder_of(run_info.folder, 3))
    assert (meta.samples, meta.epoch) == (48, 3.0)


def test_a_bad_image_is_skipped_and_reported(config: RunConfig, tmp_path: Path) -> None:
    shutil.copytree(config.data.train, tmp_path / "train")
    manifest = load_manifest(tmp_path / "train")
    record = manifest.index().images[7]
    shard = tmp_path / "train" / manifest.shards[record["shard"]].name
    damaged = bytearray(shard.read_bytes())
    damaged[record["offset"] + 50] ^= 4
    shard.write_bytes(damaged)
    config = replace(config, data=replace(config.data, train=manifest.url))
    with pytest.raises(ShardError, match=f"image {record['image_id']} in {shard.name}"):
        run(config, start(config, tmp_path / "strict"), Ranks(), None)
    config = replace(config, data=replace(config.data, max_bad_samples=1))
    tracker = MemoryTracker()
    run(config, start(config, tmp_path / "lenient"), Ranks(), tracker)
    text = tracker.last_tags["detr.left_out"]
    assert text.startswith(f"1 training images: image {record['image_id']} in {shard.name}: ")
