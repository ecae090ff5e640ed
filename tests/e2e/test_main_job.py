"""From a COCO folder to a registered, evaluated detector, with real processes killed on the way."""

import json
import re

import psutil
import pytest
import torch

from tests.e2e_command import TINY, Command, final_weights, kill, ray_workers

TRAIN = ["train", "overfit", "--data.train", "data/train", "--data.val", "data/val", *TINY]
STEPS = 240  # 40 epochs of 6 steps


@pytest.fixture(scope="module")
def worker_killed(detr: Command) -> Command:
    """A run of two workers one of which was killed on the way."""
    driver = detr.start(*TRAIN, "--optim.epochs", "40", "--track.run-name", "worker-killed")
    detr.wait_for_checkpoint("worker-killed", 20)
    kill(ray_workers(driver.pid)[0])
    output, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, output
    return detr


def test_a_run_goes_on_by_itself_when_a_worker_is_killed(worker_killed: Command) -> None:
    assert worker_killed.runs_named("worker-killed") == ["FINISHED"]
    steps = worker_killed.points("worker-killed", "train/loss")
    assert steps == sorted(set(steps))
    assert steps[-1] == STEPS
    said = worker_killed.tag("worker-killed", "detr.warning")
    assert re.search(r"^worker \d died: .*exit.*; restart 1, resumed after \d+ s at step \d+$", said), said
    assert len(worker_killed.points("worker-killed", "restart/seconds")) == 1


def test_a_run_goes_on_after_its_driver_is_killed_and_ends_with_the_same_weights(worker_killed: Command) -> None:
    detr = worker_killed
    driver = detr.start(*TRAIN, "--optim.epochs", "40", "--track.run-name", "driver-killed")
    detr.wait_for_checkpoint("driver-killed", 30)
    workers, below = ray_workers(driver.pid), psutil.Process(driver.pid).children(recursive=True)
    kill(psutil.Process(driver.pid))
    driver.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive, "the workers outlived their driver"
    detr("resume", "driver-killed")
    _, alive = psutil.wait_procs(below, timeout=120)
    assert not alive, "Ray outlived its driver"

    assert detr.runs_named("driver-killed") == ["FINISHED"]
    assert detr.points("driver-killed", "train/loss") == detr.points("worker-killed", "train/loss")
    one, other = (final_weights(detr.folder, run) for run in ("worker-killed", "driver-killed"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_registered_version_gives_the_figures_of_its_run(worker_killed: Command) -> None:
    detr = worker_killed
    detr("register", "worker-killed", "--name", "kept", "--alias", "best")
    detr("evaluate", "models:/kept@best", "--data", "data/val", "--json", "figures.json")
    figures = json.loads((detr.folder / "figures.json").read_text())
    evaluated = [
        json.loads(path.read_text()) for path in detr.folder.glob("runs/worker-killed-*/checkpoints/*/evaluation.json")
    ]
    best = max(evaluated, key=lambda metrics: metrics["AP"])
    assert len(figures) == 12
    assert figures == pytest.approx(best, abs=1e-6)


def test_predict_draws_pictures_and_writes_original_category_ids(worker_killed: Command) -> None:
    detr = worker_killed
    pictures = [str(path) for path in sorted((detr.folder / "coco/val").glob("*.jpg"))[:2]]
    detr("predict", "models:/detr-overfit@best", *pictures, "--out", "found", "--threshold", "0.01")
    found = json.loads((detr.folder / "found/detections.json").read_text())
    assert {one["category_id"] for one in found} <= {1, 2, 3, 4}
    assert {one["file_name"] for one in found} == set(pictures)
    assert len(list((detr.folder / "found").glob("*.png"))) == 2


def test_runs_lists_what_was_done(worker_killed: Command) -> None:
    assert "worker-killed" in worker_killed("runs")


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["train", "overfti"], 2, "overfit"),
        (["train", "overfit", "--optim.lrr", "1"], 2, "--optim.lr"),
        (["train", "overfit", "--data.train", "nowhere"], 1, "nowhere"),
        (["evaluate", "models:/nothing@best", "--data", "data/val"], 1, "nothing"),
        (["resume", "no-such-run"], 1, "no-such-run"),
        (["shard", "coco", "--images", "nowhere", "--annotations", "x.json", "--out", "y"], 1, "nowhere"),
        (["shard", "coco", "--images", "coco/val", "--annotations", "coco/val/broken.json", "--out", "y"], 1, "broken"),
    ],
)
def test_a_mistake_is_one_clear_line(detr: Command, words: list[str], status: int, said: str) -> None:
    (detr.folder / "coco/val/broken.json").write_text("{not json")
    output = detr(*words, status=status)
    assert len(output.splitlines()) == 1
    assert said in output


def test_an_image_whose_bytes_changed_ends_the_run_with_its_name(detr: Command) -> None:
    import shutil

    shutil.copytree(detr.folder / "data/train", detr.folder / "changed")
    shard = detr.folder / "changed/shard-000000.tar"
    content = bytearray(shard.read_bytes())
    start = content.index(b"\xff\xd8\xff") + 200
    content[start : start + 8] = bytes(byte ^ 0x55 for byte in content[start : start + 8])
    shard.write_bytes(content)
    words = ["train", "overfit", "--data.train", "changed", "--data.val", "data/val", *TINY, "--optim.epochs", "3"]
    output = detr(*words, "--track.run-name", "changed", status=1)
    assert "bytes changed" in output.splitlines()[-1]
    assert "Traceback" not in output
    assert detr.runs_named("changed") == ["FAILED"]


def test_a_truncated_shard_is_found_before_anything_starts(detr: Command) -> None:
    import shutil

    shutil.copytree(detr.folder / "data/train", detr.folder / "cut")
    shard = detr.folder / "cut/shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-2000])
    output = detr("train", "overfit", "--data.train", "cut", "--data.val", "data/val", status=1)
    assert len(output.splitlines()) == 1
    assert "shard-000000.tar" in output
