"""Records of the attempts at a run: Ray restarts the workers after a failure and when their number changes.

    attempts/0001.started       number of workers and start time
             0001.progress      rank 0 has saved something that is not computed again
             0001.cause         why the attempt ended, and when
             0001.at-3          position of worker 3, written while no step finishes
             0001.hang          which worker is stuck and keeps the others waiting
             0001.symptom       error of a worker whose peer had died; used only if there is no cause
             0001.handover      `asked`: the workers are to save and return, for others will replace them; then `done`

These are notes of one driver (`notes`), of which the first writer wins, except for the handover.
"""

from __future__ import annotations

import time
from typing import Literal, TypeVar

import msgspec

from pipeline.cluster.notes.notes import Notes

_UNKNOWN = "a worker died"
_FOLDER = "attempts/"
_ASKED, _DONE = b"asked", b"done"
T = TypeVar("T", bound=msgspec.Struct)
Kind = Literal["cause", "hang", "symptom"]
_KINDS: tuple[Kind, ...] = ("cause", "hang", "symptom")  # the most specific report first


class EndReason(msgspec.Struct, frozen=True):
    """Reason and time (seconds since 1970) of an attempt's end; `wanted`: ended to change the number of workers."""

    why: str
    at: float
    wanted: bool = False
    error: str = ""
    """Exception of a worker that is the reason, if it is one."""
    passes: bool = False
    """The cause lies outside of the run and may pass, such as a store that does not answer."""


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


def has_started(notes: Notes) -> bool:
    """Return True if workers have entered the loop, so that they can receive requests."""
    return _count(notes) > 0


def is_running(notes: Notes) -> bool | None:
    """Return True if an attempt has started and no end of it is recorded, or its workers still have to hand over.

    Return None if the cluster does not answer.
    """
    records = notes.read_all(_FOLDER)
    if records is None:
        return None
    number = _newest(records)
    if number == 0:
        return False
    ended = any(_name(number, kind) in records for kind in ("cause", "symptom"))
    return not ended or records.get(_name(number, "handover")) == _ASKED


def has_cause(notes: Notes) -> bool:
    """Return True if the cause of the current attempt's end is recorded, or a hang of it."""
    records = _read(notes)
    return any(_name(_newest(records), kind) in records for kind in ("cause", "hang"))


def start_attempt(notes: Notes, workers: int) -> Restart | None:
    """Record the start of an attempt (rank 0 only); return the restart, or None for the first attempt."""
    number = _count(notes)
    notes.write(_name(number + 1, "started"), msgspec.json.encode(_Start(workers, time.time())))
    started = notes.read(_name(number, "started"))
    if started is None:
        return None
    before = msgspec.json.decode(started, type=_Start)
    return Restart(number, end_reason(notes, number) or EndReason(_UNKNOWN, before.at), before.workers, workers)


def record_progress(notes: Notes) -> None:
    """Record that the current attempt has saved something that is not computed again."""
    notes.write(_name(_count(notes), "progress"))


def record_end(
    notes: Notes, why: str, kind: Kind = "cause", *, wanted: bool = False, error: str = "", passes: bool = False
) -> None:
    """Record why the current attempt ends, or (kind "hang") which worker is stuck in it. See `EndReason`."""
    reason = EndReason(why, time.time(), wanted, error, passes)
    notes.write(_name(_count(notes), kind), msgspec.json.encode(reason))


def repeats(notes: Notes, error: str) -> bool:
    """Return True if the attempt before ended with this exception of a worker and nothing was saved since."""
    number = _count(notes)
    if number < 2 or notes.read(_name(number, "progress")) is not None:
        return False
    before = end_reason(notes, number - 1)
    return before is not None and before.error == error


def record_position(notes: Notes, rank: int, where: msgspec.Struct) -> None:
    """Record the position of a worker that has not finished a step for long."""
    notes.write(_name(_count(notes), f"at-{rank}"), msgspec.json.encode(where))


def read_positions(notes: Notes, world_size: int, kind: type[T]) -> dict[int, T | None]:
    """Return the recorded position of each worker, by rank; None for a worker without a record."""
    records = _read(notes)
    found = {rank: records.get(_name(_newest(records), f"at-{rank}")) for rank in range(world_size)}
    return {rank: None if record is None else msgspec.json.decode(record, type=kind) for rank, record in found.items()}


def clear_hang(notes: Notes, rank: int) -> None:
    """Delete the hang report and this rank's position: it has made progress."""
    number = _count(notes)
    for kind in ("hang", f"at-{rank}"):
        notes.delete(_name(number, kind))


def end_reason(notes: Notes, number: int | None = None) -> EndReason | None:
    """Return why an attempt (by default the current one) ended: the most specific report, with the earliest time."""
    records = _read(notes)
    number = _newest(records) if number is None else number
    reports: dict[Kind, EndReason] = {}
    for kind in _KINDS:
        if record := records.get(_name(number, kind)):
            reports[kind] = msgspec.json.decode(record, type=EndReason)
    if not reports:
        return None
    best = next(iter(reports.values()))
    why = best.why
    if "hang" in reports and "cause" in reports:
        # A hang ends in many ways. Its report is more specific than the cause, but it is not always the reason.
        why = f"{reports['hang'].why} ({why})"
    ends = [report.at for kind, report in reports.items() if kind != "hang"]
    return EndReason(why, min(ends, default=best.at), best.wanted, best.error, best.passes)


def request_handover(notes: Notes) -> None:
    """Ask the workers of the current attempt to save and return, because other workers will replace them."""
    notes.write(_name(_count(notes), "handover"), _ASKED)


def handover_requested(notes: Notes) -> bool:
    """Return True if the workers of the current attempt are asked to hand over and have not done so."""
    return notes.read(_name(_count(notes), "handover")) == _ASKED


def asked_to_return(notes: Notes) -> bool:
    """Return True if the workers are asked to save and return, to stop or to hand over."""
    return notes.stop_requested() or handover_requested(notes)


def finish_handover(notes: Notes) -> None:
    """Record that the workers have saved and returned, if they were asked to."""
    if handover_requested(notes):
        notes.write(_name(_count(notes), "handover"), _DONE, overwrite=True)


def handover_finished(notes: Notes) -> bool:
    """Return True if the workers of the current attempt have handed over."""
    return notes.read(_name(_count(notes), "handover")) == _DONE


def _count(notes: Notes) -> int:
    return _newest(_read(notes))


def _read(notes: Notes) -> dict[str, bytes]:
    """Return the records of all attempts; none if the cluster does not answer."""
    return notes.read_all(_FOLDER) or {}


def _newest(records: dict[str, bytes]) -> int:
    return sum(name.endswith(".started") for name in records)


def _name(number: int, kind: str) -> str:
    return f"{_FOLDER}{number:04d}.{kind}"
