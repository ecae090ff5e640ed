"""A run whose record and whose state in MLflow follow what this driver does with it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from pipeline.checkpoint.location import Location
from pipeline.driver.launch import Launch
from pipeline.driver.lease import Lease
from pipeline.driver.record import RunRecord, write_record
from pipeline.errors import USER_ERRORS, BusyError, Interrupted, Killed, Postponed, TrackingAway
from pipeline.tracking.mlflow_client import translated_errors
from pipeline.tracking.mlflow_runs import run_with_key, set_final_status
from shards.errors import ShardError
from shards.store.retry import may_pass

if TYPE_CHECKING:
    from mlflow import MlflowClient


class RecordedRun:
    """A run that this driver alone works on: its record, and its end in the store and in MLflow."""

    def __init__(self, folder: Location, launch: Launch, lease: Lease, record: RunRecord, client: MlflowClient) -> None:
        self.folder, self.record = folder, record
        self._launch, self._lease, self._client = launch, lease, client

    def save(self, **changes: Any) -> None:
        """Change these fields of the run's record."""
        self.record = self.record.but(**changes)
        write_record(self.folder, self.record)

    @property
    def seconds(self) -> float:
        """Seconds since the command began."""
        return time.time() - self._launch.began

    def note_time(self) -> None:
        """Keep how long this driver has worked on the run, which has not ended."""
        if not self._lease.lost:
            with suppress(OSError, ShardError):  # another error is on its way
                self.save(worked_s=self.record.worked_s + self.seconds)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record in MLflow and in the store how the block ended, unless it succeeded.

        Raise `Interrupted` if the driver was asked to stop, `Postponed` if what it needs is away, and what the block
        raises if it fails for good.
        """
        try:
            with translated_errors("everything that the run has saved is kept"):
                yield
        except BaseException as error:
            if self._lease.lost:  # it is another driver's run now
                raise BusyError(
                    f"run {self.record.handle} was {self._lease.lost}; this process works on it no longer"
                ) from error
            passes = isinstance(error, (KeyboardInterrupt, SystemExit, Postponed, TrackingAway)) or may_pass(error)
            if not passes:
                self._failed(error)
                raise
            if self.record.status != "finished":  # else MLflow has it already, and only the record may lack it
                self._end("killed" if isinstance(error, Killed) else "stopped", "KILLED")
            if not self.record.run_id and not self._named:
                raise
            raise self._postponed(error) from None

    @property
    def _named(self) -> bool:
        """True if the same command continues the run."""
        return self.record.name == self.record.run_config.run_name

    def _postponed(self, error: BaseException) -> Postponed:
        """Return the error that says how a run which has not failed is continued."""
        advice = f"`detr resume {self.record.handle}`{', or the same command,' if self._named else ''} continues"
        if isinstance(error, Killed):
            return Killed(f"killed: {error}; {advice}")
        if isinstance(error, (KeyboardInterrupt, SystemExit, Interrupted)):
            return Interrupted(f"stopped; everything up to the last checkpoint is kept: {advice}")
        return Postponed(f"{error}; {advice}")

    def _failed(self, error: BaseException) -> None:
        self._end("failed", "FAILED")
        if self.record.run_id and isinstance(error, USER_ERRORS):
            with suppress(OSError, ShardError):
                self.save(status="failed", message=str(error))

    def _end(self, phase: str, status: str) -> None:
        """Set phase and status of the run in MLflow, also if this driver was stopped while it created it."""
        run_id = self.record.run_id
        if not run_id:
            with suppress(Exception):
                run_id = run_with_key(self._client, self.record.run_config, self.record.key)
        if run_id:
            set_final_status(self._client, run_id, phase, status, self._launch.say)
