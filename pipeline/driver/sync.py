"""Sending of what a run's last driver could not: it was killed, or ended while MLflow was away."""

from __future__ import annotations

from pipeline.driver.find import find
from pipeline.driver.launch import Say
from pipeline.driver.record import RunRecord, read_record, write_record
from pipeline.driver.sole_driver import sole_driver
from pipeline.errors import Postponed
from pipeline.tracking.mlflow_client import connect, tracking_uri, translated_errors
from pipeline.tracking.mlflow_runs import set_final_status
from pipeline.tracking.run_spools import count_left

_ENDS = {"finished": "FINISHED", "failed": "FAILED"}


def sync(name: str, say: Say) -> None:
    """Send to MLflow what it has not taken of a run on which no driver works, and set the run's status there.

    `name` is the run's id, its name, its location or a registered version. Raise `BusyError` while a driver works on it,
    and `Postponed` if MLflow does not take everything.
    """
    folder, record = find(name)
    with sole_driver(folder, record.name, say):
        newer = read_record(folder)  # another driver may have written it since
        record = newer if newer and newer.run_id else record
        client = connect()
        complete, events = count_left(folder, record.run_id, tracking_uri(), say)
        with translated_errors():
            running = client.get_run(record.run_id).info.status == "RUNNING"
        phase = record.status if record.status in _ENDS else "killed"
        told = not running or set_final_status(client, record.run_id, phase, _ENDS.get(phase, "KILLED"), say)
        if newer and newer.unsent and complete and told:
            write_record(folder, newer.but(unsent=False))
    if not complete:
        raise Postponed(
            f"MLflow took {events} events of run {record.handle} and not all; the same command sends the rest"
        )
    say(_result(record, events))


def _result(record: RunRecord, events: int) -> str:
    sent = (
        f"sent {events} events of run {record.handle}" if events else f"nothing was left to send of run {record.handle}"
    )
    if record.status in _ENDS:
        return f"{sent}; it is {record.status}"
    return f"{sent}; it is not finished: `detr resume {record.handle}` continues it"
