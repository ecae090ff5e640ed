"""Records of the attempts at a run: Ray restarts the workers after a failure and when their number changes.

    <run folder>/attempts/0001.started       number of workers and start time
                          0001.cause         why the attempt ended, and when
                          0001.at-3          position of worker 3, written while no step finishes
                          0001.hang          which worker is stuck and keeps the others waiting
                          0001.symptom       error of a worker whose peer had died; used only if there is no cause

Every file is written atomically, and the first writer wins. The records belong to one driver: the next one deletes
them (`clear_notes`).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from pipeline.run_folder import ATTEMPTS, write_once

_UNKNOWN = "a worker died"
T = TypeVar("T", bound=msgspec.Struct)
Kind = Literal["cause", "hang", "symptom"]
_KINDS: tuple[Kind, ...] = ("cause", "hang", "symptom")  # the most specific report first


class EndReason(msgspec.Struct, frozen=True):
    """Reason and time (seconds since 1970) of an attempt's end; `wanted`: ended to change the number of workers."""

    why: str
    at: float
    wanted: bool = False


class _Start(msgspec.Struct, frozen=True):
    workers: int
    at: float


class Restart(msgspec.Struct, frozen=True):
    """A restart of the workers. `number` is 1 for the second attempt; `before` and `workers` are numbers of workers."""

    number: int
    ended: EndReason
    before: int
    workers: int

    def message(self, step: int, now: float) -> str:
        """Return one line about the cause and the cost of the restart, once `step` steps are done."""
        facts = [f"{self.ended.why}; restart {self.number}"]
        if self.before != self.workers:
            facts.append(f"{self.before} -> {self.workers} workers")
        facts.append(f"resumed after {self.seconds(now):.0f} s at step {step}")
        return ", ".join(facts)

    def seconds(self, now: float) -> float:
        """Return the seconds from the end of the previous attempt until `now`."""
        return max(0.0, now - self.ended.at)


def has_started(folder: Path) -> bool:
    """Return True if workers have entered the loop, so that they can receive requests."""
    return _count(folder) > 0


def is_running(folder: Path) -> bool:
    """Return True if an attempt has started and no end of it is recorded."""
    number = _count(folder)
    return number > 0 and not any(_path(folder, number, kind).exists() for kind in ("cause", "symptom"))


def has_cause(folder: Path) -> bool:
    """Return True if the cause of the current attempt's end is recorded, or a hang of it."""
    return any(_path(folder, _count(folder), kind).exists() for kind in ("cause", "hang"))


def start_attempt(folder: Path, workers: int) -> Restart | None:
    """Record the start of an attempt (rank 0 only); return the restart, or None for the first attempt."""
    number = _count(folder)
    _write(_path(folder, number + 1, "started"), _Start(workers, time.time()))
    if number == 0:
        return None
    before = msgspec.json.decode(_path(folder, number, "started").read_bytes(), type=_Start)
    return Restart(number, end_reason(folder, number) or EndReason(_UNKNOWN, before.at), before.workers, workers)


def record_end(folder: Path, why: str, kind: Kind = "cause", *, wanted: bool = False) -> None:
    """Record why the current attempt ends, or (kind "hang") which worker is stuck in it."""
    _write(_path(folder, _count(folder), kind), EndReason(why, time.time(), wanted))


def record_position(folder: Path, rank: int, where: msgspec.Struct) -> None:
    """Record the position of a worker that has not finished a step for long."""
    _write(_path(folder, _count(folder), f"at-{rank}"), where)


def read_positions(folder: Path, world_size: int, kind: type[T]) -> dict[int, T | None]:
    """Return the recorded position of each worker, by rank; None for a worker without a record."""
    paths = {rank: _path(folder, _count(folder), f"at-{rank}") for rank in range(world_size)}
    return {
        rank: msgspec.json.decode(path.read_bytes(), type=kind) if path.exists() else None
        for rank, path in paths.items()
    }


def clear_hang(folder: Path, rank: int) -> None:
    """Delete the hang report and this rank's position: it has made progress."""
    for kind in ("hang", f"at-{rank}"):
        _path(folder, _count(folder), kind).unlink(missing_ok=True)


def end_reason(folder: Path, number: int | None = None) -> EndReason | None:
    """Return why an attempt (by default the current one) ended: the most specific report, with the earliest time."""
    number = _count(folder) if number is None else number
    reports: dict[Kind, EndReason] = {}
    for kind in _KINDS:
        path = _path(folder, number, kind)
        if path.exists():
            reports[kind] = msgspec.json.decode(path.read_bytes(), type=EndReason)
    if not reports:
        return None
    best = next(iter(reports.values()))
    why = best.why
    if "hang" in reports and "cause" in reports:
        # A hang ends in many ways. Its report is more specific than the cause, but it is not always the reason.
        why = f"{reports['hang'].why} ({why})"
    ends = [report.at for kind, report in reports.items() if kind != "hang"]
    return EndReason(why, min(ends, default=best.at), best.wanted)


def _count(folder: Path) -> int:
    return len(list((folder / ATTEMPTS).glob("*.started")))


def _path(folder: Path, number: int, kind: str) -> Path:
    return folder / ATTEMPTS / f"{number:04d}.{kind}"


def _write(path: Path, record: msgspec.Struct) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_once(path, msgspec.json.encode(record))
