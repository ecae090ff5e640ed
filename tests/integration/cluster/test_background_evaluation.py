"""Background evaluation on a real Ray: checkpoints that a driver left, a killed process, and further training."""

import os
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from pipeline.checkpoint import catalog
from pipeline.checkpoint.metadata import read_meta
from pipeline.config import RunConfig
from pipeline.distributed.ranks import Ranks
from pipeline.driver.changes import ResumeOptions
from pipeline.errors import TrainingError
from pipeline.inference.evaluate import evaluate
from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.mlflow_runs import find_run
from pipeline.train import Launch, resume, train
from pipeline.training.loop import run
from pipeline.training.state import RunInfo
from tests.support.runs import run_folder_table, start
from tests.support.workers import stand_in

EPOCHS = 4  # of three steps


def kill_first_evaluation(done: threading.Event, killed: list[int]) -> None:
    """Kill the first child process that evaluates, as soon as it does."""
    while not done.wait(0.05):
        for process in psutil.Process().children(recursive=True):
            try:
                if process.name().startswith("ray::eval") or "ray::eval" in " ".join(process.cmdline()):
                    process.kill()
                    killed.append(process.pid)
                    return
            except psutil.Error:
                continue


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own, in this process
def test_pending_checkpoints_are_evaluated_during_training_despite_kills(
    tiny_config: RunConfig, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    )
    beside = replace(
        tiny_config,
        storage=str(tmp_path / "runs"),
        checkpoint=replace(tiny_config.checkpoint, keep=1),
        evaluate=replace(tiny_config.evaluate, asynchronous=True),
    )
    expected = evaluated_inside(tiny_config, tmp_path / "inside")

    def workers_whose_driver_dies(config: RunConfig, run_id: str, folder: Path, **_: object) -> None:
        run(config, RunInfo(run_id, folder, "commit"), Ranks(), None)
        raise TrainingError("the driver is gone")

    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch, workers_whose_driver_dies)
        with pytest.raises(TrainingError, match="the driver is gone"):
            train(beside, Launch(say=lambda text: None))
    (folder,) = (tmp_path / "runs").iterdir()
    assert [path.name for path in catalog.pending_evaluation(folder)] == ["step-00000003", "step-00000006"]

    done, killed, lines = threading.Event(), list[int](), list[str]()
    killer = threading.Thread(target=kill_first_evaluation, args=(done, killed))
    killer.start()
    try:
        outcome = resume("tiny", ResumeOptions(epochs=EPOCHS), Launch(say=lines.append))
    finally:
        done.set()
        killer.join()
    assert len(killed) == 1
    assert catalog.pending_evaluation(folder) == []
    client = connect()
    found = find_run(client, "tiny")
    assert found.info.status == "FINISHED"
    points = client.get_metric_history(found.info.run_id, "val/AP")
    assert Counter(point.step for point in points) == {step: 1 for step in expected}
    for point in points:
        assert point.value == pytest.approx(expected[point.step]["AP"], abs=1e-6)
    assert [point.value for point in client.get_metric_history(found.info.run_id, "evaluation/images")] == [
        5.0
    ] * EPOCHS
    images = [file.path for file in client.list_artifacts(found.info.run_id, "images") if file.path.endswith(".png")]
    drawn = [path.split("+")[2] for path in images if path.startswith("images/At_a_glance~precision_recall+step+")]
    assert sorted(map(int, drawn)) == [0, *sorted(expected)]  # the newest is at step 0, too
    best = max(expected, key=lambda step: (expected[step]["AP"], step))
    assert read_meta(outcome.best).step == best
    assert outcome.metrics == pytest.approx(expected[best], abs=1e-6)
    # A pending checkpoint is pruned once it has its metrics.
    assert {path.name for path in catalog.list_checkpoints(folder)} == {
        f"step-{step:08d}" for step in (best, 3 * EPOCHS)
    }
    assert {path.name for path in folder.iterdir()} <= {name.rstrip("/") for name, _, _ in run_folder_table()}
    registered = evaluate("models:/detr-tiny@best", tiny_config.data.val)
    assert registered.score.metrics == pytest.approx(expected[best], abs=1e-6)


def evaluated_inside(config: RunConfig, folder: Path) -> dict[int, dict[str, float]]:
    """Return the metrics by step of the same run with its evaluations inside it."""
    config = replace(
        config,
        optim=replace(config.optim, epochs=EPOCHS),
        checkpoint=replace(config.checkpoint, keep=9),
    )
    run(config, start(config, folder), Ranks(), None)
    metrics_of = {read_meta(path).step: catalog.read_evaluation(path) for path in catalog.list_checkpoints(folder)}
    return {step: metrics for step, metrics in metrics_of.items() if metrics is not None}
