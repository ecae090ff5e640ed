"""What became of each attempt at a run: Ray starts the workers again after a failure, and when their number changes.

    <run folder>/attempts/0001.begun         how many workers, and when
                          0001.cause         why it ended, and when: of those who know, the first
                          0001.at-3          where worker 3 stands, as long as no step ends
                          0001.hang          who therefore keeps the others waiting
                          0001.consequence   what the others met when it ended: said only where nobody knows more

A file is whole or absent, and of several writers the first one's word stands. The folder is of one driver: the next
begins it anew.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

_UNKNOWN = "a worker died"
T = TypeVar("T", bound=msgspec.Struct)
Kind = Literal["cause", "hang", "consequence"]


class Word(msgspec.Struct, frozen=True):
    """Why an attempt ended, and when, in seconds since 1970. `wanted`: it was ended to go on with more or fewer workers."""

    why: str
    at: float
    wanted: bool = False


class _Begun(msgspec.Struct, frozen=True):
    workers: int
    at: float


class Restart(msgspec.Struct, frozen=True):
    """An attempt that is not the first. number: 1 for the second attempt."""

    number: int
    ended: Word
    before: int
    workers: int

    def told(self, step: int, now: float) -> str:
        """One line, once `step` steps are done: what happened, and what it cost."""
        resized = f"{self.before} -> {self.workers} workers" if self.before != self.workers else ""
        after = f"goes on after {max(0.0, now - self.ended.at):.0f} s at step {step}"
        return ", ".join(part for part in (f"{self.ended.why}; restart {self.number}", resized, after) if part)

    def seconds(self, now: float) -> float:
        """From the end of the attempt before until `now`."""
        return max(0.0, now - self.ended.at)


def forget(folder: Path) -> None:
    """A driver starts: attempts of the one before are not its own."""
    shutil.rmtree(folder / "attempts", ignore_errors=True)


def begun(folder: Path) -> bool:
    """Whether workers have entered the loop, so that they can be asked for something."""
    return _count(folder) > 0


def at_work(folder: Path) -> bool:
    """Whether an attempt has begun and nobody knows of its end."""
    number = _count(folder)
    return number > 0 and not any(_path(folder, number, kind).exists() for kind in ("cause", "consequence"))


def begin(folder: Path, workers: int) -> Restart | None:
    """Rank 0 says that an attempt begins; returns what came before it, unless it is the first."""
    number = _count(folder)
    _leave(folder, f"{number + 1:04d}.begun", _Begun(workers, time.time()))
    if number == 0:
        return None
    before = msgspec.json.decode(_path(folder, number, "begun").read_bytes(), type=_Begun)
    return Restart(number, last_word(folder, number) or Word(_UNKNOWN, before.at), before.workers, workers)


def end(folder: Path, why: str, kind: Kind = "cause", *, wanted: bool = False) -> None:
    """Say why the attempt at hand ends, or what hangs in it."""
    _leave(folder, f"{_count(folder):04d}.{kind}", Word(why, time.time(), wanted))


def stand(folder: Path, rank: int, where: msgspec.Struct) -> None:
    """A worker that has waited for long says where it stands."""
    _leave(folder, f"{_count(folder):04d}.at-{rank}", where)


def standings(folder: Path, world_size: int, kind: type[T]) -> dict[int, T | None]:
    """Where each worker stands, or None where it says nothing."""
    paths = {rank: _path(folder, _count(folder), f"at-{rank}") for rank in range(world_size)}
    return {
        rank: msgspec.json.decode(path.read_bytes(), type=kind) if path.exists() else None
        for rank, path in paths.items()
    }


def goes_on(folder: Path, rank: int) -> None:
    """What hung hangs no more."""
    for kind in ("hang", f"at-{rank}"):
        _path(folder, _count(folder), kind).unlink(missing_ok=True)


def last_word(folder: Path, number: int | None = None) -> Word | None:
    """Why an attempt ended, by default the one at hand: in the words of who knew most, at the time of who knew first."""
    number = _count(folder) if number is None else number
    said: dict[Kind, Word] = {}
    kinds: tuple[Kind, ...] = ("cause", "hang", "consequence")
    for kind in kinds:
        path = _path(folder, number, kind)
        if path.exists():
            said[kind] = msgspec.json.decode(path.read_bytes(), type=Word)
    if not said:
        return None
    first = next(iter(said.values()))
    why = first.why
    if "hang" in said and "cause" in said:
        # What was waited for too long ends in many ways: what hung says more, and is not always the cause.
        why = f"{said['hang'].why} ({why})"
    ends = [word.at for kind, word in said.items() if kind != "hang"]
    return Word(why, min(ends, default=first.at), first.wanted)


def _count(folder: Path) -> int:
    return len(list((folder / "attempts").glob("*.begun")))


def _path(folder: Path, number: int, kind: str) -> Path:
    return folder / "attempts" / f"{number:04d}.{kind}"


def _leave(folder: Path, name: str, word: msgspec.Struct) -> None:
    target = folder / "attempts" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f"{name}.{secrets.token_hex(4)}")
    aside.write_bytes(msgspec.json.encode(word))
    try:
        os.link(aside, target)  # unlike a rename, it leaves what is there
    except FileExistsError:
        pass
    finally:
        aside.unlink()
