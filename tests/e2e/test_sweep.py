"""A sweep on a real Ray: trials that end early, one that is revived, and the command that comes again."""

import json
from pathlib import Path

import pytest
import torch

from pipeline.driver.record import read_record
from tests.support.command import TINY, Command, newest_weights, train_alone
from tests.support.recording import Recording

TRIALS = [f"lr={lr}-seed={seed}" for lr in ("1e-3", "1e-9") for seed in (1, 2)]
SWEEP = [
    "sweep",
    "it",
    "overfit",
    "--optim.lr",
    "1e-3,1e-9",
    "--seed",
    "1,2",
    "--metric",
    "train/loss",
    "--mode",
    "min",
]
SWEEP += ["--early-stop", "asha", "--reduction", "2", "--parallel", "2", "--cluster.workers", "1"]
SWEEP += ["--data.train", "data/train", "--data.val", "data/val", *TINY, "--optim.max-steps", "60"]


@pytest.mark.slow
def test_trials_end_early_and_a_revived_one_is_as_if_it_had_never_ended(
    detr: Command, recording: Recording, tmp_path: Path
) -> None:
    recording.pace(0.3)
    output = detr(*SWEEP)
    print(output)
    record = json.loads((detr.folder / "runs" / "it" / "sweep.json").read_text())
    stopped = record["stopped"]
    assert sorted(record["trials"]) == [f"it-{trial}" for trial in sorted(TRIALS)]
    assert 1 <= len(stopped) < len(TRIALS), output
    assert detr.runs_named("it") == ["FINISHED"]
    parents = {detr.tag(f"it-{trial}", "mlflow.parentRunId") for trial in TRIALS}
    assert parents == {record["run_id"]}
    best = detr.tag("it", "detr.sweep.best")
    assert best.startswith("it-lr=1e-3")  # the other learning rate learns nothing
    assert best not in stopped
    assert f"best        {best}" in output
    assert "registered as models:/detr-overfit/1 (@best)" in output

    recording.pace(0)
    again = detr(*SWEEP)
    assert " starts" not in again, again  # all have ended
    assert "models:/detr-overfit/1" in again

    revived = next(iter(stopped))
    assert detr.runs_named(revived) == ["KILLED"]
    detr("resume", revived)
    assert detr.runs_named(revived) == ["FINISHED"]
    run = detr.folder / "runs" / revived
    known = read_record(run)
    assert known is not None
    alone = tmp_path / "alone"
    alone.mkdir()
    train_alone(known.run_config, run, alone)
    weights, expected = newest_weights(known.run_config, run), newest_weights(known.run_config, alone)
    assert all(torch.equal(value, weights[name]) for name, value in expected.items())
    print(f"{revived} ended at {stopped[revived]}, revived: {len(expected)} tensors bitwise equal")
