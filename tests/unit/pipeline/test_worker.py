"""The whole loop in one process on a tiny data set: when it saves and evaluates, and that a stop costs nothing."""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from detr.batch import Batch
from detr.model import build_model
from pipeline import checkpoint
from pipeline import worker as module
from pipeline.breakdown import PARTS
from pipeline.config import RunConfig
from pipeline.errors import CheckpointError
from pipeline.identity import continuation
from pipeline.parallel import Ranks
from pipeline.saving import Saver
from pipeline.standing import Progress, read_progress
from pipeline.state import Place
from pipeline.step import RANDOMNESS, StepResult, train_step
from pipeline.stopping import NOTHING, Asked, Overseer
from pipeline.track import MemoryTracker
from pipeline.weights import build_trained, save_initial
from pipeline.worker import run
from shards.errors import ShardError
from shards.manifest import load_manifest
from shards.plan import epoch_order
from shards.score import METRICS
from shards.steps import Origin

STEPS = 6  # two epochs of twelve images in batches of four


class Kill(BaseException):
    """Stands for a kill: nothing in the loop may catch it."""


class KillingTracker(MemoryTracker):
    """Dies when a point of the family is told at or after the step."""

    def __init__(self, family: str, step: int) -> None:
        super().__init__()
        self._family, self._step = family, step

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        if step >= self._step and any(name.split("/")[0] == self._family for name in values):
            raise Kill
        super().metrics(values, step)


def start(config: RunConfig, folder: Path) -> Place:
    torch.manual_seed(config.seed)
    save_initial(build_model(config.model, 4), folder)
    return Place("run", folder, "commit")


def weights(config: RunConfig, folder: Path) -> dict[str, torch.Tensor]:
    model = build_model(config.model, 4)
    path = checkpoint.newest(folder)
    assert path is not None
    checkpoint.load_weights(path, model)
    return model.state_dict()


def trained_weights(config: RunConfig, folder: Path) -> dict[str, torch.Tensor]:
    """As `weights`, of a model of which a part is frozen."""
    model = build_trained(config, 4)
    path = checkpoint.newest(folder)
    assert path is not None
    checkpoint.load_weights(path, model)
    return model.state_dict()


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def evaluated(folder: Path) -> list[str]:
    return [path.name[-2:] for path in checkpoint.complete(folder) if checkpoint.read_evaluation(path) is not None]


@pytest.fixture
def config(tiny_config: RunConfig) -> RunConfig:
    return replace(tiny_config, checkpoint=replace(tiny_config.checkpoint, every_steps=2, keep=9))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test leaves an uninterrupted run, for the others to compare with."""
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def uninterrupted(config: RunConfig, finished: Path) -> Path:
    if not finished.exists():
        run(config, start(config, finished), Ranks(), None)
    return finished


@pytest.fixture
def place(config: RunConfig, tmp_path: Path) -> Place:
    return start(config, tmp_path / "run")


def test_a_run_saves_evaluates_and_tells_at_the_right_steps(config: RunConfig, place: Place) -> None:
    tracker = MemoryTracker()
    run(config, place, Ranks(), tracker)
    assert [path.name[-1] for path in checkpoint.complete(place.folder)] == ["2", "3", "4", "6"]
    assert evaluated(place.folder) == ["03", "06"]
    assert [step for name, _, step in tracker.points if name == "train/loss"] == [1, 2, 3, 4, 5, 6]
    assert [step for name, _, step in tracker.points if name == "val/AP"] == [3, 6]
    assert [step for _, step in tracker.checkpoints] == [3, 6]
    # The first, without detections, shows the truth: the slider of MLflow opens at step 0.
    assert [step for name, step in tracker.pictures if name == "detections/0"] == [0, 3, 6]
    assert [step for name, step in tracker.pictures if name == "curves/precision_recall"] == [0, 3, 6]
    assert len(tracker.pictures) == 6
    assert tracker.tables["per_class_ap.json"]["category_id"] == [1, 2, 3, 4]
    assert len(tracker.tables["precision_recall.json"]["recall"]) == 101
    rates = {step: value for name, value, step in tracker.points if name == "optim/lr"}
    assert rates == pytest.approx({1: 1e-3, 2: 1e-3, 3: 1e-3, 4: 1e-4, 5: 1e-4, 6: 1e-4})
    assert [value for name, value, _ in tracker.points if name == "epoch"][-1] == 2.0


def test_the_parts_of_a_run_s_steps_add_up_to_the_time_that_they_took(config: RunConfig, place: Place) -> None:
    config, tracker = replace(config, track=replace(config.track, log_every=2)), MemoryTracker()
    start_s = time.perf_counter()
    run(config, place, Ranks(), tracker)
    took_s = time.perf_counter() - start_s
    told = {(name, step): value for name, value, step in tracker.points if name.startswith("step/")}
    assert {step for _, step in told} == {2, 3, 4, 6}
    for step in (2, 3, 4, 6):
        parts = [told[f"step/{part}_s", step] for part in PARTS]
        assert min(parts) >= 0
        assert sum(parts) == pytest.approx(told["step/total_s", step])
        assert min(told[f"step/{part}_s", step] for part in ("forward", "loss", "backward", "optimizer")) > 0
    # The interval that ends at step 4 began with the save of step 3, which waited for that of step 2 to be whole.
    assert told["step/checkpoint_stall_s", 4] > 0
    steps = {2: 2, 3: 1, 4: 1, 6: 2}
    assert 0 < sum(told["step/total_s", step] * count for step, count in steps.items()) < took_s
    assert read_progress(tracker.last_tags) == Progress(6, 2.0, tracker_end(tracker))


def tracker_end(tracker: MemoryTracker) -> str:
    """The predicted end, which is not far from now."""
    progress = read_progress(tracker.last_tags)
    assert progress is not None
    assert progress.ends is not None
    assert abs((progress.ends - datetime.now(UTC)).total_seconds()) < 30
    return progress.end


def test_a_run_with_masks_tells_their_losses_and_scores(masks_config: RunConfig, tmp_path: Path) -> None:
    place, tracker = start(masks_config, tmp_path / "run"), MemoryTracker()
    run(masks_config, place, Ranks(), tracker)
    points = {name: value for name, value, step in tracker.points if step == 3}
    assert {f"val/mask_{name}" for name in METRICS} | {f"val/{name}" for name in METRICS} <= points.keys()
    assert points["train/loss_mask"] > 0 < points["train/loss_dice"]
    assert len(tracker.tables["per_class_ap.json"]["mask_AP"]) == 4
    metrics = checkpoint.read_evaluation(checkpoint.folder_of(place.folder, 3))
    assert metrics is not None
    assert metrics["mask_AP"] == points["val/mask_AP"]
    assert len(tracker.tables["precision_recall.json"]["mask_precision"]) == 101
    assert sorted(tracker.pictures) == [
        (name, step) for name in ("curves/precision_recall", "detections/0") for step in (0, 3)
    ]


def test_training_the_mask_head_changes_it_alone(masks_config: RunConfig, tmp_path: Path) -> None:
    config = replace(masks_config, optim=replace(masks_config.optim, train="mask_head"))
    place = start(config, tmp_path / "run")
    torch.manual_seed(config.seed)
    before = build_model(config.model, 4).state_dict()
    run(config, place, Ranks(), None)
    after = weights(config, place.folder)
    changed = {name.split(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"bbox_attention", "mask_head"}
    untouched = [name for name in after if name.startswith("mask_head") and torch.equal(before[name], after[name])]
    assert untouched == []


def test_an_interrupted_training_of_the_mask_head_ends_with_the_very_weights(
    masks_config: RunConfig, tmp_path: Path
) -> None:
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


@pytest.mark.parametrize("step", [1, 3, 4, 6])
def test_an_interrupted_run_ends_with_the_very_weights_of_an_uninterrupted_one(
    config: RunConfig, place: Place, uninterrupted: Path, step: int
) -> None:
    tracker = KillingTracker("train", step)
    with pytest.raises(Kill):
        run(config, place, Ranks(), tracker)
    torch.manual_seed(999)  # a new process has another state of the global generator
    run(config, place, Ranks(), MemoryTracker())
    assert_same(weights(config, place.folder), weights(config, uninterrupted))
    assert evaluated(place.folder) == ["03", "06"]


def test_a_run_that_is_lengthened_ends_as_one_that_was_long_from_the_start(
    config: RunConfig, place: Place, uninterrupted: Path
) -> None:
    run(replace(config, optim=replace(config.optim, max_steps=2)), place, Ranks(), None)
    assert evaluated(place.folder) == ["02"]
    run(replace(config, optim=replace(config.optim, max_steps=5)), place, Ranks(), None)
    run(config, place, Ranks(), None)
    assert_same(weights(config, place.folder), weights(config, uninterrupted))


def test_a_checkpoint_that_was_saved_but_not_evaluated_is_evaluated_first(config: RunConfig, place: Place) -> None:
    with pytest.raises(Kill):
        run(config, place, Ranks(), KillingTracker("evaluation", 3))
    assert checkpoint.newest(place.folder) == checkpoint.folder_of(place.folder, 3)
    assert evaluated(place.folder) == []
    tracker = MemoryTracker()
    run(config, place, Ranks(), tracker)
    assert tracker.points[0][2] == 3
    assert evaluated(place.folder) == ["03", "06"]


def test_a_kill_between_telling_and_noting_an_evaluation_repeats_it(
    config: RunConfig, place: Place, uninterrupted: Path
) -> None:
    def killed(*_: object) -> None:
        raise Kill

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.checkpoint, "write_evaluation", killed)
        with pytest.raises(Kill):
            run(config, place, Ranks(), MemoryTracker())
    run(config, place, Ranks(), None)
    figures = [checkpoint.read_evaluation(checkpoint.folder_of(folder, 6)) for folder in (place.folder, uninterrupted)]
    assert figures[0] == figures[1] is not None


def test_a_finished_run_that_is_entered_again_does_nothing(config: RunConfig, uninterrupted: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
    tracker = MemoryTracker()
    run(config, Place("run", uninterrupted, "commit"), Ranks(), tracker)
    assert tracker.points == []
    assert {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")} == before


def test_another_seed_batch_size_or_data_set_is_refused(config: RunConfig, uninterrupted: Path) -> None:
    place = Place("run", uninterrupted, "commit")
    others = {
        "seed 42, now it is 43": replace(config, seed=43),
        "optim.batch_size 4, now it is 6": replace(config, optim=replace(config.optim, batch_size=6)),
        "training data digest": replace(config, data=replace(config.data, train=config.data.val)),
    }
    for said, other in others.items():
        with pytest.raises(CheckpointError, match=said) as caught:
            run(other, place, Ranks(), None)
        assert "\n" not in str(caught.value)


def test_another_plan_is_refused_and_so_are_other_classes(config: RunConfig, uninterrupted: Path) -> None:
    place = Place("run", uninterrupted, "commit", accept_change=False)
    others = {
        "data.sort_window 1, now it is 2": replace(config.data, sort_window=2),
        "data.shuffle_shards 0, now it is 1": replace(config.data, shuffle_shards=1),
        "data.epoch_tail straddle, now it is short": replace(config.data, epoch_tail="short"),
    }
    for said, data in others.items():
        with pytest.raises(CheckpointError, match=said):
            run(replace(config, data=data), place, Ranks(), None)
    meta = checkpoint.read_meta(checkpoint.folder_of(uninterrupted, 4))
    fewer = msgspec.structs.replace(meta, num_classes=3)
    with pytest.raises(CheckpointError, match=r"is of 3 classes and .* has 4"):
        continuation(fewer, config, load_manifest(config.data.train), accept_change=True)


def shown_images(patch: pytest.MonkeyPatch) -> dict[int, list[int]]:
    """Filled, while runs run, with the image ids of each step."""
    seen: dict[int, list[int]] = {}

    def step(model: Any, batches: Sequence[Batch], optimizer: Any, config: Any, ranks: Any, *more: Any) -> StepResult:
        seen[more[0]] = [target.image_id for batch in batches for target in batch.targets]
        return train_step(model, batches, optimizer, config, ranks, *more)

    patch.setattr(module, "train_step", step)
    return seen


def test_an_accepted_batch_size_goes_on_at_the_next_sample(
    config: RunConfig, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = shown_images(monkeypatch)
    run(replace(config, optim=replace(config.optim, max_steps=2)), place, Ranks(), None)
    wider = replace(config, optim=replace(config.optim, batch_size=5))
    changed = replace(place, accept_change=True)
    with pytest.raises(Kill):
        run(wider, changed, Ranks(), KillingTracker("train", 5))
    meta = checkpoint.read_meta(checkpoint.folder_of(place.folder, 4))
    assert (meta.samples, meta.batch_size, meta.origin_step, meta.origin_samples) == (18, 5, 2, 8)
    run(wider, place, Ranks(), None)  # what was accepted once is the run's own from then on
    # The stream as it was, from the very sample on.
    ids = load_manifest(config.data.train).index().images["image_id"]
    stream = np.concatenate([ids[epoch_order(config.seed, epoch, 12)] for epoch in range(3)]).tolist()
    starts = [0, 4, 8, 13, 18, 23, 28]
    for step, (begin, end) in enumerate(pairwise(starts)):
        assert sorted(seen[step]) == sorted(stream[begin:end])
    assert len(seen) == 6
    assert evaluated(place.folder)[-1] == "06"


def test_accepted_data_is_entered_at_the_same_number_of_samples(
    config: RunConfig, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = shown_images(monkeypatch)
    run(replace(config, optim=replace(config.optim, max_steps=2)), place, Ranks(), None)
    other = replace(config, data=replace(config.data, train=config.data.val), optim=replace(config.optim, epochs=3))
    run(other, replace(place, accept_change=True), Ranks(), None)  # 8 of 3 times 5 samples were seen
    assert list(seen) == [0, 1, 2, 3]
    way = continuation(
        checkpoint.read_meta(checkpoint.folder_of(place.folder, 2)), other, load_manifest(config.data.val), True
    )
    assert (way.origin, way.exact) == (Origin(2, 8), False)
    assert way.told(5).startswith("another stream of samples from step 2 (8 samples) on: training data digest")
    assert "entered at epoch 1.60 and may show images of that epoch again or never" in way.told(5)


def test_a_checkpoint_from_before_there_were_options_of_the_plan_goes_on(
    config: RunConfig, place: Place, uninterrupted: Path
) -> None:
    run(replace(config, optim=replace(config.optim, max_steps=2)), place, Ranks(), None)
    path = checkpoint.folder_of(place.folder, 2) / "meta.json"
    meta = json.loads(path.read_text())
    for name in ("sort_window", "shuffle_shards", "epoch_tail", "origin_step", "origin_samples"):
        del meta[name]
    path.write_text(json.dumps(meta))
    run(config, place, Ranks(), None)
    assert_same(weights(config, place.folder), weights(config, uninterrupted))


def test_with_short_tails_and_windows_an_interrupted_run_ends_with_the_very_weights(
    config: RunConfig, tmp_path: Path
) -> None:
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


def test_the_checkpoint_says_what_it_is_of(config: RunConfig, uninterrupted: Path) -> None:
    meta = checkpoint.read_meta(checkpoint.folder_of(uninterrupted, 4))
    assert (meta.step, meta.samples, meta.run_id, meta.seed, meta.batch_size) == (4, 16, "run", 42, 4)
    assert (meta.num_classes, meta.code_commit, meta.world_size) == (4, "commit", 1)
    assert meta.epoch == pytest.approx(16 / 12)
    assert (meta.val_digest, meta.total_steps) == (load_manifest(config.data.val).digest, 6)
    assert meta.lr_factor == pytest.approx(0.1)
    assert meta.randomness == RANDOMNESS
    assert meta.best is not None
    assert meta.best.step == 3
    assert meta.configuration() == config
    assert (
        {"torch", "torchvision", "numpy", "webdataset", "mlflow", "ray", "detr-cluster"}
        >= meta.versions.keys()
        > {"torch"}
    )


def test_evaluations_come_every_so_many_epochs_and_at_the_end(config: RunConfig, place: Place) -> None:
    longer = replace(
        config,
        optim=replace(config.optim, batch_size=12, epochs=3),
        evaluate=replace(config.evaluate, every=2),
        checkpoint=replace(config.checkpoint, every_steps=0),
    )
    run(longer, place, Ranks(), None)
    assert evaluated(place.folder) == ["02", "03"]


def test_a_batch_larger_than_the_data_set_still_trains(config: RunConfig, place: Place) -> None:
    wide = replace(config, optim=replace(config.optim, batch_size=16, epochs=3))
    tracker = MemoryTracker()
    run(wide, place, Ranks(), tracker)  # three epochs are 36 samples; the third step is filled up from a fourth
    meta = checkpoint.read_meta(checkpoint.folder_of(place.folder, 3))
    assert (meta.samples, meta.epoch) == (48, 3.0)


def saved_by_the_clock(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Rank 0's clock asks while these steps are taken, counted from 1."""
    seen = shown_images(monkeypatch)
    monkeypatch.setattr(Saver, "asked", lambda _: Asked(save=len(seen) + 1 in steps))


def test_a_save_that_the_clock_asks_for_changes_neither_the_result_nor_the_curves(
    config: RunConfig, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(
        config,
        checkpoint=replace(config.checkpoint, every_steps=0),
        track=replace(config.track, log_every=3),
    )
    plain, clocked = MemoryTracker(), MemoryTracker()
    run(config, place, Ranks(), plain)
    other = start(config, tmp_path / "clocked")
    saved_by_the_clock(monkeypatch, 1, 2, 4, 6)
    written, write = [], checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *more: (written.append(more[2].step), write(*more))[1])
    run(config, other, Ranks(), clocked)
    assert written == [1, 2, 3, 4, 6]  # the last one is due in any case
    assert [path.name[-1] for path in checkpoint.complete(other.folder)] == ["1", "2", "3", "4", "6"]
    assert_same(weights(config, other.folder), weights(config, place.folder))

    def curves(tracker: MemoryTracker) -> list[Any]:
        measured = ("speed", "step", "step_share", "evaluation")
        return [point for point in tracker.points if point[0].split("/")[0] not in measured]

    assert curves(clocked) == curves(plain) != []


def test_a_run_goes_on_from_a_save_that_the_clock_asked_for(
    config: RunConfig, place: Place, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, checkpoint=replace(config.checkpoint, every_steps=0))
    saved_by_the_clock(monkeypatch, 5)
    with pytest.raises(Kill):
        run(config, place, Ranks(), KillingTracker("train", 6))
    assert checkpoint.newest(place.folder) == checkpoint.folder_of(place.folder, 5)
    run(config, place, Ranks(), None)
    assert_same(weights(config, place.folder), weights(config, uninterrupted))


def test_a_checkpoint_that_cannot_be_written_ends_the_run_long_before_the_next_one(
    config: RunConfig, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise CheckpointError("no room")

    config = replace(
        config,
        optim=replace(config.optim, epochs=20),
        checkpoint=replace(config.checkpoint, every_steps=0),
        evaluate=replace(config.evaluate, every=20),
    )
    asked = Saver.asked
    saved_by_the_clock(monkeypatch, 1)
    at_first = Saver.asked
    monkeypatch.setattr(Saver, "asked", lambda saver: Asked(save=at_first(saver).save or asked(saver).save))
    monkeypatch.setattr(checkpoint, "write", full)
    tracker = MemoryTracker()
    with pytest.raises(CheckpointError, match="no room"):
        run(config, place, Ranks(), tracker)
    assert max(step for name, _, step in tracker.points if name == "train/loss") < 30


def test_milestones_are_saved_and_stay(config: RunConfig, place: Place) -> None:
    tight = replace(
        config,
        optim=replace(config.optim, epochs=4),
        evaluate=replace(config.evaluate, every=3),
        checkpoint=replace(config.checkpoint, every_steps=0, keep=1, keep_every_epochs=2),
    )
    run(tight, place, Ranks(), None)
    best = checkpoint.best(place.folder)
    assert best is not None
    left = {path.name[-2:]: checkpoint.read_meta(path).milestone for path in checkpoint.complete(place.folder)}
    assert left == {best[0].name[-2:]: False} | {"06": True, "12": True}


def test_old_checkpoints_go_and_the_best_stays(config: RunConfig, place: Place) -> None:
    tight = replace(config, checkpoint=replace(config.checkpoint, every_steps=1, keep=1))
    run(tight, place, Ranks(), None)
    names = [path.name[-1] for path in checkpoint.complete(place.folder)]
    best = checkpoint.best(place.folder)
    assert best is not None
    assert set(names) == {"6", best[0].name[-1]}


def test_the_data_set_may_lie_elsewhere_when_the_run_goes_on(
    config: RunConfig, place: Place, uninterrupted: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(config.data.train, moved)
    run(replace(config, optim=replace(config.optim, max_steps=2)), place, Ranks(), None)
    run(replace(config, data=replace(config.data, train=str(moved))), place, Ranks(), None)
    assert_same(weights(config, place.folder), weights(config, uninterrupted))


def test_a_bad_image_is_left_out_and_said_with_the_run(config: RunConfig, tmp_path: Path) -> None:
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
    told = tracker.last_tags["detr.left_out"]
    assert told.startswith(f"1 training images: image {record['image_id']} in {shard.name}: ")


def test_a_run_that_is_asked_to_stop_saves_after_the_step_and_goes_on_from_it(
    config: RunConfig, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked_at(step: int) -> None:
        seen = shown_images(monkeypatch)
        monkeypatch.setattr(module.StopWatch, "asked", lambda _: Asked(stop=len(seen) == step))

    run(config, place, Ranks(), None)
    whole = start(config, tmp_path / "stopped")
    asked_at(1)  # while the second step is taken
    run(config, whole, Ranks(), None)
    assert checkpoint.newest(whole.folder) == checkpoint.folder_of(whole.folder, 2)
    asked_at(99)
    run(config, whole, Ranks(), None)
    assert_same(weights(config, place.folder), weights(config, whole.folder))


def test_the_overseer_hears_of_every_step_and_what_it_asks_for_is_done(config: RunConfig, place: Place) -> None:
    heard: list[int] = []
    asked = {0: Asked(save=True), 3: Asked(stop=True)}  # after so many steps, of the one that follows
    config = replace(config, checkpoint=replace(config.checkpoint, every_steps=0, keep=9))
    overseer = Overseer(lambda: asked.get(len(heard), NOTHING), heard.append)
    run(config, place, Ranks(), None, overseer)
    assert heard == [1, 2, 3, 4]
    assert [path.name for path in checkpoint.complete(place.folder)] == [f"step-{step:08d}" for step in (1, 3, 4)]
