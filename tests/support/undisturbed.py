"""Comparison of a run that has ended with the run that nothing disturbs, in weights and in MLflow."""

import sqlite3
from collections import Counter
from pathlib import Path

import torch

from pipeline.checkpoint.location import Location
from pipeline.config import RunConfig
from pipeline.driver.record import read_record
from pipeline.tracking.tracker import ATTEMPT_FAMILIES
from tests.support.command import newest_weights, train_alone


def differences(run: Location, database: Path, folder: Path) -> tuple[list[str], int]:
    """Return what differs between the run at this location and the undisturbed one, and the number of points in MLflow.

    The undisturbed run is trained into `folder`, by as many processes. `database` is MLflow's.
    """
    record = read_record(run)
    assert record is not None
    folder.mkdir()
    expected = train_alone(record.run_config, run, folder)
    found = [_of_weights(record.run_config, run, folder)]
    with sqlite3.connect(database) as connection:
        select = connection.execute
        runs = select("select status from runs where name = ?", (run.name,)).fetchall()
        versions = select(_VERSIONS, (run.name,)).fetchone()[0]
        points: list[tuple[str, int, float]] = select(_POINTS, (run.name,)).fetchall()
    found.append("" if runs == [("FINISHED",)] else f"runs in MLflow: {runs}")
    found.append("" if versions == 1 else f"{versions} registered versions")
    of_steps = [(key, step) for key, step, _ in points if key.split("/")[0] not in ATTEMPT_FAMILIES]
    twice = [point for point, count in Counter(of_steps).items() if count > 1]
    found.append(f"{len(twice)} points twice, {twice[:3]} first" if twice else "")
    wanted = Counter((key, step, value) for key, value, step in expected if key.startswith(("train/", "val/")))
    missing = sorted((wanted - Counter(points)).elements())
    found.append(
        f"{len(missing)} of {wanted.total()} points missing or different, {missing[:3]} first" if missing else ""
    )
    return [difference for difference in found if difference], len(points)


_VERSIONS = "select count(*) from model_versions join runs on run_id = run_uuid where runs.name = ?"
_POINTS = "select key, step, value from metrics join runs using (run_uuid) where runs.name = ?"


def _of_weights(config: RunConfig, run: Location, undisturbed: Path) -> str:
    weights, expected = newest_weights(config, run), newest_weights(config, undisturbed)
    unequal = [name for name, value in expected.items() if not torch.equal(value, weights[name])]
    return f"{len(unequal)} of {len(expected)} weights differ, {unequal[0]} first" if unequal else ""
