"""From a COCO folder to a registered, evaluated detector, with real processes killed on the way."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from tests.support.command import TINY, Command, config_of, kill, newest_weights, ray_workers, train_alone
from tests.support.recording import Recording

TRAIN = ["train", "overfit", "--data.train", "data/train", "--data.val", "data/val", *TINY]
EPOCHS, STEPS = 10, 60


@dataclass(frozen=True)
class Killed:
    """A finished run whose driver was killed and, after `detr resume`, one of its two workers.

    orphans: workers of the killed driver that were alive a minute later. servers: all that the killed driver had started.
    """

    detr: Command
    orphans: list[psutil.Process]
    servers: list[psutil.Process]


@pytest.fixture(scope="module")
def killed(detr: Command, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    recording = Recording(tmp_path_factory.mktemp("killed") / "steps")
    recording.pace(0.1)  # and more before the kills, so that the run does not end
    detr.env |= recording.environment
    driver = detr.start(
        *TRAIN, "--optim.epochs", str(EPOCHS), "--evaluate.every", "5", "--track.run-name", "killed-once"
    )
    detr.wait_for_checkpoint("killed-once", 10)
    recording.pace(2)
    workers, servers = ray_workers(driver.pid), psutil.Process(driver.pid).children(recursive=True)
    assert len(workers) == 2
    kill(psutil.Process(driver.pid))
    driver.wait()
    _, orphans = psutil.wait_procs(workers, timeout=200)

    recording.pace(0.1)
    driver = detr.start("resume", "killed-once")
    detr.wait_for_checkpoint("killed-once", 30)
    recording.pace(2)
    kill(ray_workers(driver.pid)[0])
    recording.pace(0)
    output, _ = driver.communicate(timeout=500)
    assert driver.returncode == 0, output
    return Killed(detr, orphans, servers)


def test_workers_end_with_a_killed_driver(killed: Killed) -> None:
    assert not killed.orphans


def test_run_resumes_by_itself_after_a_worker_is_killed(killed: Killed) -> None:
    detr = killed.detr
    assert detr.runs_named("killed-once") == ["FINISHED"]
    steps = detr.points("killed-once", "train/loss")
    assert steps == sorted(set(steps))
    assert steps[-1] == STEPS
    warning = detr.tag("killed-once", "detr.warning")
    assert re.search(r"^worker \d died: .*exit.*; restart 1, resumed after \d+ s at step \d+$", warning), warning
    assert len(detr.points("killed-once", "restart/seconds")) == 1


def test_killed_run_ends_with_the_weights_and_points_of_an_undisturbed_run(killed: Killed, tmp_path: Path) -> None:
    detr = killed.detr
    (folder,) = detr.folder.glob("runs/killed-once-*")
    config = config_of(detr.folder, "killed-once")
    points = train_alone(config, folder, tmp_path)
    assert detr.points("killed-once", "train/loss") == [step for name, _, step in points if name == "train/loss"]
    disturbed, undisturbed = newest_weights(config, folder), newest_weights(config, tmp_path)
    assert disturbed.keys() == undisturbed.keys()
    assert all(torch.equal(value, undisturbed[name]) for name, value in disturbed.items())


def test_registered_version_gives_the_figures_of_its_run(killed: Killed) -> None:
    detr = killed.detr
    detr("register", "killed-once", "--name", "kept", "--alias", "best")
    detr("evaluate", "models:/kept@best", "--data", "data/val", "--json", "figures.json")
    figures = json.loads((detr.folder / "figures.json").read_text())
    evaluated = [
        json.loads(path.read_text()) for path in detr.folder.glob("runs/killed-once-*/checkpoints/*/evaluation.json")
    ]
    best = max(evaluated, key=lambda metrics: metrics["AP"])
    assert len(figures) == 12
    assert figures == pytest.approx(best, abs=1e-6)


def test_predict_draws_pictures_and_writes_original_category_ids(killed: Killed) -> None:
    detr = killed.detr
    pictures = [str(path) for path in sorted((detr.folder / "coco/val").glob("*.jpg"))[:2]]
    detr("predict", "models:/detr-overfit@best", *pictures, "--out", "found", "--threshold", "0.01")
    found = json.loads((detr.folder / "found/detections.json").read_text())
    assert {detection["category_id"] for detection in found} <= {1, 2, 3, 4}
    assert {detection["file_name"] for detection in found} == set(pictures)
    assert len(list((detr.folder / "found").glob("*.png"))) == 2


def test_runs_lists_finished_runs(killed: Killed) -> None:
    assert "killed-once" in killed.detr("runs")


def test_ray_ends_with_a_killed_driver(killed: Killed) -> None:
    """Last in this file: some of Ray's servers take a minute to notice, while the tests above run."""
    _, alive = psutil.wait_procs(killed.servers, timeout=120)
    assert not alive
