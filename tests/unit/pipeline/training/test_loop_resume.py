"""Resumed runs: the same weights as without the stop, and refusal of another stream of samples."""

import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from detr.config import DeformableConfig
from pipeline.checkpoint import catalog
from pipeline.checkpoint.metadata import read_meta
from pipeline.config import RunConfig
from pipeline.distributed.ranks import Ranks
from pipeline.errors import CheckpointError
from pipeline.training.continuation import continuation
from pipeline.training.loop import run
from pipeline.training.state import RunInfo
from shards.dataset.manifest import load_manifest
from shards.plan.epoch import epoch_order
from shards.plan.steps import Origin
from tests.support.runs import Kill, KillingTracker, assert_same, evaluated, shown_images, start, weights
from tests.support.tracker import MemoryTracker


@pytest.mark.parametrize("step", [1, 3, 4, 6])
def test_an_interrupted_run_ends_with_the_same_weights(
    config: RunConfig, run_info: RunInfo, uninterrupted: Path, step: int
) -> None:
    tracker = KillingTracker("train", step)
    with pytest.raises(Kill):
        run(config, run_info, Ranks(), tracker)
    torch.manual_seed(999)  # a new process has another state of the global generator
    run(config, run_info, Ranks(), MemoryTracker())
    assert_same(weights(config, run_info.folder), weights(config, uninterrupted))
    assert evaluated(run_info.folder) == ["03", "06"]


HYBRID = DeformableConfig(levels=3, box_refine=True, two_stage=True, mixed_selection=True, one_to_many_queries=6)


@pytest.mark.parametrize(
    ("variant", "options"),
    [("deformable", DeformableConfig(levels=3)), ("deformable", HYBRID), ("conditional", DeformableConfig())],
    ids=["one stage", "hybrid", "conditional"],
)
def test_an_interrupted_run_of_a_variant_ends_with_the_same_weights(
    config: RunConfig, tmp_path: Path, variant: Any, options: DeformableConfig
) -> None:
    model = replace(config.model, variant=variant, hidden_dim=32, deformable=options)
    config = replace(config, model=model, optim=replace(config.optim, max_steps=3))
    whole, parts = start(config, tmp_path / "whole"), start(config, tmp_path / "parts")
    run(config, whole, Ranks(), None)
    with pytest.raises(Kill):
        run(config, parts, Ranks(), KillingTracker("train", 3))
    torch.manual_seed(999)
    run(config, parts, Ranks(), None)
    assert_same(weights(config, parts.folder), weights(config, whole.folder))
    figures = [catalog.read_evaluation(catalog.folder_of(found.folder, 3)) for found in (whole, parts)]
    assert figures[0] == figures[1] is not None


def test_a_lengthened_run_ends_like_one_that_was_long_from_the_start(
    config: RunConfig, run_info: RunInfo, uninterrupted: Path
) -> None:
    run(replace(config, optim=replace(config.optim, max_steps=2)), run_info, Ranks(), None)
    assert evaluated(run_info.folder) == ["02"]
    run(replace(config, optim=replace(config.optim, max_steps=5)), run_info, Ranks(), None)
    run(config, run_info, Ranks(), None)
    assert_same(weights(config, run_info.folder), weights(config, uninterrupted))


def test_a_saved_checkpoint_without_metrics_is_evaluated_first(config: RunConfig, run_info: RunInfo) -> None:
    with pytest.raises(Kill):
        run(config, run_info, Ranks(), KillingTracker("evaluation", 3))
    assert catalog.newest(run_info.folder) == catalog.folder_of(run_info.folder, 3)
    assert evaluated(run_info.folder) == []
    tracker = MemoryTracker()
    run(config, run_info, Ranks(), tracker)
    assert tracker.points[0][2] == 3
    assert evaluated(run_info.folder) == ["03", "06"]


def test_a_kill_between_reporting_and_writing_metrics_repeats_evaluation(
    config: RunConfig, run_info: RunInfo, uninterrupted: Path
) -> None:
    def killed(*_: object) -> None:
        raise Kill

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "write_evaluation", killed)
        with pytest.raises(Kill):
            run(config, run_info, Ranks(), MemoryTracker())
    run(config, run_info, Ranks(), None)
    figures = [catalog.read_evaluation(catalog.folder_of(folder, 6)) for folder in (run_info.folder, uninterrupted)]
    assert figures[0] == figures[1] is not None


def test_a_finished_run_that_is_entered_again_does_nothing(config: RunConfig, uninterrupted: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
    tracker = MemoryTracker()
    run(config, RunInfo("run", uninterrupted, "commit"), Ranks(), tracker)
    assert tracker.points == []
    assert {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")} == before


def test_another_seed_batch_size_or_data_set_is_refused(config: RunConfig, uninterrupted: Path) -> None:
    run_info = RunInfo("run", uninterrupted, "commit")
    others = {
        "seed 42, now it is 43": replace(config, seed=43),
        "optim.batch_size 4, now it is 6": replace(config, optim=replace(config.optim, batch_size=6)),
        "training data digest": replace(config, data=replace(config.data, train=config.data.val)),
    }
    for message, other in others.items():
        with pytest.raises(CheckpointError, match=message) as caught:
            run(other, run_info, Ranks(), None)
        assert "\n" not in str(caught.value)


def test_another_plan_is_refused_and_so_are_other_classes(config: RunConfig, uninterrupted: Path) -> None:
    run_info = RunInfo("run", uninterrupted, "commit", accept_change=False)
    others = {
        "data.sort_window 1, now it is 2": replace(config.data, sort_window=2),
        "data.shuffle_shards 0, now it is 1": replace(config.data, shuffle_shards=1),
        "data.epoch_tail straddle, now it is short": replace(config.data, epoch_tail="short"),
    }
    for message, data in others.items():
        with pytest.raises(CheckpointError, match=message):
            run(replace(config, data=data), run_info, Ranks(), None)
    meta = read_meta(catalog.folder_of(uninterrupted, 4))
    fewer = msgspec.structs.replace(meta, num_classes=3)
    with pytest.raises(CheckpointError, match=r"is of 3 classes and .* has 4"):
        continuation(fewer, config, load_manifest(config.data.train), accept_change=True)


def test_an_accepted_batch_size_continues_at_the_next_sample(
    config: RunConfig, run_info: RunInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = shown_images(monkeypatch)
    run(replace(config, optim=replace(config.optim, max_steps=2)), run_info, Ranks(), None)
    wider = replace(config, optim=replace(config.optim, batch_size=5))
    changed = replace(run_info, accept_change=True)
    with pytest.raises(Kill):
        run(wider, changed, Ranks(), KillingTracker("train", 5))
    meta = read_meta(catalog.folder_of(run_info.folder, 4))
    assert (meta.samples, meta.option("optim.batch_size"), meta.origin_step, meta.origin_samples) == (18, 5, 2, 8)
    run(wider, run_info, Ranks(), None)  # what was accepted once is the run's own from then on
    # The stream as it was, from the very sample on.
    ids = load_manifest(config.data.train).index().images["image_id"]
    stream = np.concatenate([ids[epoch_order(config.seed, epoch, 12)] for epoch in range(3)]).tolist()
    starts = [0, 4, 8, 13, 18, 23, 28]
    for step, (begin, end) in enumerate(pairwise(starts)):
        assert sorted(seen[step]) == sorted(stream[begin:end])
    assert len(seen) == 6
    assert evaluated(run_info.folder)[-1] == "06"


def test_accepted_data_is_entered_at_the_same_number_of_samples(
    config: RunConfig, run_info: RunInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = shown_images(monkeypatch)
    run(replace(config, optim=replace(config.optim, max_steps=2)), run_info, Ranks(), None)
    other = replace(config, data=replace(config.data, train=config.data.val), optim=replace(config.optim, epochs=3))
    run(other, replace(run_info, accept_change=True), Ranks(), None)  # 8 of 3 times 5 samples were seen
    assert list(seen) == [0, 1, 2, 3]
    continued = continuation(
        read_meta(catalog.folder_of(run_info.folder, 2)),
        other,
        load_manifest(config.data.val),
        True,
    )
    assert (continued.origin, continued.exact) == (Origin(2, 8), False)
    assert continued.message(5).startswith("another stream of samples from step 2 (8 samples) on: training data digest")
    assert "entered at epoch 1.60 and may show images of that epoch again or never" in continued.message(5)


FORMAT_2 = """\
{
  "step": 2,
  "epoch": 0.6666666666666666,
  "samples": 8,
  "run_id": "run",
  "seed": 42,
  "batch_size": 4,
  "train_digest": "TRAIN_DIGEST",
  "num_classes": 4,
  "code_commit": "commit",
  "world_size": 1,
  "versions": {"torch": "2.15.0", "torchvision": "0.29.2", "numpy": "2.4.6", "ray": "2.60.0", "webdataset":
    "1.0.2", "mlflow": "3.17.2", "detr-cluster": "0.1.0"},
  "format": 2,
  "sort_window": 1,
  "shuffle_shards": 0,
  "epoch_tail": "straddle",
  "origin_step": 0,
  "origin_samples": 0,
  "plan_version": 1,
  "val_digest": "VAL_DIGEST",
  "total_steps": 6,
  "lr_factor": 1.0,
  "randomness":
    "1: dropout from torch.manual_seed((seed * 1000003 + step) * 4099 + rank + (micro-batch << 48))",
  "best": null,
  "milestone": false,
  "evaluate": false,
  "ema": false,
  "config": {
    "recipe": "tiny",
    "seed": 42,
    "storage": "/data/runs",
    "initial": "",
    "model": {"backbone": "tiny", "norm": "group", "backbone_weights": "random", "dilation": false,
      "frozen_stages": 2, "position": "sine", "hidden_dim": 16, "heads": 2, "encoder_layers": 1,
      "decoder_layers": 2, "feedforward_dim": 32, "dropout": 0.1, "num_queries": 8, "pre_norm": false,
      "auxiliary": true, "masks": false, "position_temperature": 10000.0, "position_at_input": false,
      "decoder_input": "zeros", "query_init": "normal", "tied_attention_init": false},
    "loss": {"cost_class": 1.0, "cost_bbox": 5.0, "cost_giou": 2.0, "weight_ce": 1.0, "weight_bbox": 5.0,
      "weight_giou": 2.0, "weight_mask": 1.0, "weight_dice": 1.0, "eos_coef": 0.1, "auxiliary": true},
    "transform": {"train_scales": [48, 64], "eval_size": 64, "max_size": 64, "flip": 0.5, "crop": false,
      "crop_scales": [400, 500, 600], "crop_range": [384, 600], "pixels": "parity", "mean": [0.485, 0.456,
      0.406], "std": [0.229, 0.224, 0.225]},
    "data": {"train": "/data/train", "val": "/data/val", "built_in": false, "reader_threads": 1,
      "sort_window": 1, "shuffle_shards": 0, "epoch_tail": "straddle", "cache": "", "cache_gib": 0.0,
      "max_bad_samples": 0},
    "optim": {"batch_size": 4, "epochs": 2, "lr": 0.001, "lr_backbone": 0.0001, "weight_decay": 0.0001,
      "clip_norm": 0.1, "decay": "step", "decay_epoch": 1, "decay_factor": 0.1, "warmup_epochs": 0.0,
      "max_steps": 0, "ema": 0.0, "train": "all", "normalise": "global"},
    "compute": {"precision": "fp32", "channels_last": true, "compile": false, "canvas_multiple": 1,
      "max_microbatch": 0, "recompute": "none"},
    "evaluate": {"every": 1, "batch_size": 2, "batching": "same_size", "asynchronous": false, "limit": 0,
      "pictures": 1},
    "checkpoint": {"every_steps": 2, "every_minutes": 0.0, "keep": 9, "keep_every_epochs": 0, "store": ""},
    "guard": {"policy": "stop", "max_grad_norm": 0.0, "max_events": 3},
    "cluster": {"workers": 1, "min_workers": 0, "strategy": "ddp", "gpu": "auto", "cpus_per_worker": 1,
      "max_failures": 3, "collective_timeout_s": 600},
    "track": {"experiment": "detr", "run_name": "", "register_as": "", "log_every": 1}
  },
  "part": ""
}
"""


FORMAT_1 = """\
{
  "step": 2, "epoch": 0.6666666666666666, "samples": 8, "run_id": "run", "seed": 42, "batch_size": 4,
  "train_digest": "TRAIN_DIGEST", "num_classes": 4, "code_commit": "commit", "world_size": 1,
  "versions": {"torch": "2.11"}, "format": 1
}
"""


@pytest.mark.parametrize("text", [FORMAT_1, FORMAT_2])
def test_a_run_continues_from_a_checkpoint_of_an_older_format(
    config: RunConfig, run_info: RunInfo, uninterrupted: Path, text: str
) -> None:
    run(replace(config, optim=replace(config.optim, max_steps=2)), run_info, Ranks(), None)
    train, val = load_manifest(config.data.train).digest, load_manifest(config.data.val).digest
    path = catalog.folder_of(run_info.folder, 2) / "meta.json"
    path.write_text(text.replace("TRAIN_DIGEST", train).replace("VAL_DIGEST", val))
    run(config, run_info, Ranks(), None)
    assert_same(weights(config, run_info.folder), weights(config, uninterrupted))


def test_an_interrupted_run_with_short_tails_ends_with_the_same_weights(config: RunConfig, tmp_path: Path) -> None:
    data = replace(config.data, sort_window=2, shuffle_shards=2, epoch_tail="short")
    config = replace(config, data=data, optim=replace(config.optim, batch_size=5))
    whole, parts = start(config, tmp_path / "whole"), start(config, tmp_path / "parts")
    tracker = MemoryTracker()
    run(config, whole, Ranks(), tracker)
    assert [step for name, _, step in tracker.points if name == "val/AP"] == [3, 6]
    assert {step: value for name, value, step in tracker.points if name == "epoch"}[3] == 1.0
    with pytest.raises(Kill):
        run(config, parts, Ranks(), KillingTracker("train", 5))
    run(config, parts, Ranks(), None)
    assert_same(weights(config, parts.folder), weights(config, whole.folder))


def test_the_data_set_may_move_before_the_run_is_resumed(
    config: RunConfig, run_info: RunInfo, uninterrupted: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(config.data.train, moved)
    run(replace(config, optim=replace(config.optim, max_steps=2)), run_info, Ranks(), None)
    run(replace(config, data=replace(config.data, train=str(moved))), run_info, Ranks(), None)
    assert_same(weights(config, run_info.folder), weights(config, uninterrupted))
