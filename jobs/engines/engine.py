"""Interface of engines, and a job as all of them describe it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TextIO

from jobs.plan import Plan

State = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]
ENDED: tuple[State, ...] = ("STOPPED", "SUCCEEDED", "FAILED")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """A job on a cluster."""

    id: str
    """Name by which `detr jobs` finds it: that of the plan, `Plan.job`, or the launcher's number."""
    state: State
    started: float | None = None
    """Seconds since the epoch."""
    command: str = ""
    run: str = ""
    """Name of the run that it trains, if the launcher knows."""
    reason: str = ""
    """Reason why it waits or has failed, in the launcher's words."""


class Engine(Protocol):
    """A launcher. Its functions raise `JobError`, one line, if its client is missing or the cluster does not answer.

    `cluster` is the entry class of the launcher.
    """

    suffix: ClassVar[str]
    """Ending of the file that `render` describes, such as .yaml."""

    def render(self, plan: Plan) -> str:
        """Return the file that describes the job to the launcher, without secrets."""

    def by_hand(self, plan: Plan, file: str) -> list[str]:
        """Return the commands that submit the written file, after writing what it needs beside it."""

    def submit(self, plan: Plan, say: Say) -> str:
        """Hand the job over and return its id; `say` gets lines for the user."""

    def status(self, cluster: Any, job: str) -> Job:
        """Return the job."""

    def logs(self, cluster: Any, job: str, stream: TextIO, *, follow: bool = False) -> None:
        """Copy the job's output to `stream`; with `follow`, until it ends, and raise `JobError` if it did not succeed."""

    def stop(self, cluster: Any, job: str) -> str:
        """Stop the job, which saves first; wait until it has ended and return a line that says how."""

    def list(self, cluster: Any) -> list[Job]:
        """Return the jobs, newest first."""
