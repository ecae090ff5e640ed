"""The run that `detr resume` means: by its location, or by what MLflow knows."""

from __future__ import annotations

from pathlib import Path

from pipeline.checkpoint.location import Location, location
from pipeline.config import from_json
from pipeline.driver.record import RunRecord, new_record, read_record
from pipeline.errors import RunConfigError
from pipeline.run_folder import RECORD
from pipeline.tracking.mlflow_client import connect, translated_errors
from pipeline.tracking.mlflow_runs import find_run, read_config
from pipeline.tracking.tags import TAG_FOLDER, TAG_TRAIN_DIGEST, TAG_VAL_DIGEST


def find(name: str) -> tuple[Location, RunRecord]:
    """Return the location and the record of the run that `name` means: an id, a name, a version or a location.

    A run of a release without records gets one from MLflow. Raise one of `USER_ERRORS` if there is no such run.
    """
    if "/" in name and not name.startswith("models:/"):
        return _at(name)
    client = connect()
    with translated_errors():
        if name.startswith("models:/"):
            from pipeline.registry.versions import run_of

            name = run_of(client, name)
        run = find_run(client, name)
        folder = location(run.data.tags[TAG_FOLDER])
        record = read_record(folder)
        if record is not None:  # without an id if its driver was killed while it created the run
            return folder, record if record.run_id else record.but(run_id=str(run.info.run_id))
        config = from_json(read_config(client, run.info.run_id))
    digests = (run.data.tags.get(TAG_TRAIN_DIGEST, ""), run.data.tags.get(TAG_VAL_DIGEST, ""))
    status = {"FINISHED": "finished", "FAILED": "failed"}.get(run.info.status, "running")
    record = new_record(folder.name, config, config, digests)
    return folder, record.but(run_id=str(run.info.run_id), status=status)


def _at(url: str) -> tuple[Location, RunRecord]:
    folder = location(url.rstrip("/"))
    folder = folder.absolute() if isinstance(folder, Path) else folder
    record = read_record(folder)
    if record is None or not record.run_id:
        raise RunConfigError(
            f"{folder} has no {RECORD} of a run; expected the location of a run, STORAGE/NAME; or give its id or name"
        )
    return folder, record
