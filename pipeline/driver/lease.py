"""Lease of a run: one driver at a time works on it, on any host, with nothing shared but the run's store.

A driver writes a claim, a small file in the run's store, and then looks for those of others. It holds the lease when it
has seen no other claim after writing its own, has written that it holds, and has then seen no other holder. Of two
claims at the same time the lower id stays and the other is withdrawn. The holder raises a counter in its claim every few
seconds. Clocks are not compared: a claim is dead if it does not change while it is watched, or at once if its process
ran on this machine and is gone. Dead claims are removed, and the next holder has a higher term, so that a holder which
was only paused learns that its lease is over.

A holder that cannot reach the store tries again for as long as the workers wait for it: most often nobody else can write
there either. Then it gives the lease up, since another driver may have been able to take it all the time.
"""

from __future__ import annotations

import logging
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import msgspec

from pipeline.checkpoint.location import Location
from pipeline.errors import BusyError
from pipeline.run_folder import LEASE
from shards.errors import ShardError, one_line
from shards.store import storage
from shards.store.retry import fewer_retries

LOG = logging.getLogger(__name__)
HEARTBEAT_S = 5.0
_LOOK_S = 1.0
_LOOKS = 16  # a little more than three heartbeats
PATIENCE_S = 30 * 60.0
"""Time without a heartbeat after which a holder gives the lease up: that of the workers with the store
(`pipeline.checkpoint.patience`), since a run whose store answers again must find its driver."""


class Holder(msgspec.Struct, frozen=True):
    """Process that works on a run."""

    host: str
    pid: int
    system: str = ""
    """Start of the machine and namespace of processes in which `pid` is known; empty if unknown."""
    started: str = ""
    """Start of the process, since numbers of processes are used again."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def state(self) -> Literal["alive", "dead", "unknown"]:
        """State of the process if it is of this machine."""
        if not self.system or self.system != _system():
            return "unknown"
        return "alive" if _started(self.pid) == self.started else "dead"


def this_process() -> Holder:
    """Return this process as a holder."""
    return Holder(platform.node(), os.getpid(), _system(), _started(os.getpid()))


def _system() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Return the start of a process in ticks since the machine's, or an empty text if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


class Claim(msgspec.Struct, frozen=True):
    """A driver's claim on a run, or its lease if `held`."""

    id: str
    holder: Holder
    held: bool = False
    term: int = 1
    beat: int = 0


class Claims:
    """Claims on a run, in its store."""

    def __init__(self, folder: Location) -> None:
        self._folder = folder / LEASE

    def read(self) -> dict[str, Claim]:
        """Return the claims by id; leave out files that are none."""
        names = [name for name in self._listing() if name.endswith(".json") and name[0] != "."]
        claims: dict[str, Claim] = {}
        for name in names:
            with suppress(FileNotFoundError, msgspec.DecodeError):  # withdrawn meanwhile, or no claim
                claims[name] = msgspec.json.decode(storage.read(str(self._folder / name)), type=Claim)
        return {claim.id: claim for claim in claims.values()}

    def _listing(self) -> Iterable[str]:
        # In a folder a file that is listed may be renamed before its size is read, by a driver that writes its claim.
        folder = self._folder
        if not isinstance(folder, Path):
            return storage.listing(str(folder))
        return os.listdir(folder) if folder.is_dir() else []

    def write(self, claim: Claim) -> None:
        """Write a claim, whole or not at all."""
        storage.write(str(self._folder / f"{claim.id}.json"), msgspec.json.encode(claim))

    def remove(self, claim_id: str) -> None:
        """Remove a claim if it is there."""
        storage.remove(str(self._folder / f"{claim_id}.json"))


class Watch:
    """Judgement of other drivers' claims by whether they change from look to look."""

    def __init__(self, looks: int = _LOOKS) -> None:
        self._looks = looks
        self._seen: dict[str, tuple[Claim, int]] = {}

    def judge(self, claim: Claim) -> Literal["alive", "dead", "unknown"]:
        """Return the state of the driver that made `claim`; call this once for each look."""
        known = claim.holder.state
        if known != "unknown":
            return known
        before, looks = self._seen.get(claim.id, (claim, 0))
        changed = before != claim
        self._seen[claim.id] = claim, 0 if changed else looks + 1
        if changed:
            return "alive"
        return "dead" if looks >= self._looks else "unknown"


class Lease:
    """Lease of a run for one driver: acquire it, keep it alive and release it."""

    def __init__(
        self,
        claims: Claims,
        name: str,
        holder: Holder | None = None,
        *,
        say: Callable[[str], None] = lambda text: None,
        look_s: float = _LOOK_S,
        looks: int = _LOOKS,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._claims, self._name, self._say = claims, name, say
        self._look_s, self._looks, self._sleep = look_s, looks, sleep
        self._claim = Claim(secrets.token_hex(8), holder or this_process())
        self.dead: list[Holder] = []
        """Holders that were found dead, and whose work this lease takes over."""
        self.lost = ""
        """Reason for which this driver holds the lease no longer; empty while it does."""

    def acquire(self) -> None:
        """Acquire the lease; raise `BusyError` with the holder's name if another driver has it or gets it."""
        try:
            self._await_claims()
            self._write(held=True)
            # A driver whose claim was removed as dead may have been paused only, and may have written meanwhile.
            holders = [other for other in self._others() if other.held]
            if holders:
                raise self._busy(holders[0])
        except BaseException:
            self.release()
            raise

    def _await_claims(self) -> None:
        """Write the claim and return when it is the only one."""
        watch, announced = Watch(self._looks), False
        while True:
            self._write(beat=self._claim.beat + 1)  # other drivers watch it, too
            left = 0
            for other in self._others():
                state = watch.judge(other)
                if state == "dead":
                    self._take_over(other)
                elif state == "alive" and (other.held or other.id < self._claim.id):
                    raise self._busy(other)
                else:
                    left += 1
                    if not announced and state == "unknown":
                        self._say(f"run {self._name} is claimed by {other.holder}: seeing whether it still works ...")
                        announced = True
            if not left:
                return
            self._sleep(self._look_s)

    def _take_over(self, other: Claim) -> None:
        self._claims.remove(other.id)
        self._claim = msgspec.structs.replace(self._claim, term=max(self._claim.term, other.term + 1))
        if other.held:
            self.dead.append(other.holder)

    def _busy(self, other: Claim) -> BusyError:
        return BusyError(
            f"run {self._name} is being trained by {other.holder}; expected one driver: wait for it, or stop it first"
        )

    def _others(self) -> list[Claim]:
        return [claim for claim in self._claims.read().values() if claim.id != self._claim.id]

    def _write(self, **changes: object) -> None:
        self._claim = msgspec.structs.replace(self._claim, **changes)
        self._claims.write(self._claim)

    def beat(self) -> bool:
        """Raise the counter; return False if another driver has taken the lease, because this one seemed dead."""
        claims = self._claims.read()
        newer = [claim for claim in claims.values() if claim.held and claim.term > self._claim.term]
        if newer or self._claim.id not in claims:
            self.lost = f"taken over by {newer[0].holder}" if newer else "removed by another driver"
            return False
        self._write(beat=self._claim.beat + 1)
        return True

    def release(self) -> None:
        """Withdraw the claim; if that fails, others find it dead."""
        with suppress(OSError, ShardError), fewer_retries():
            self._claims.remove(self._claim.id)

    @contextmanager
    def kept(self, on_lost: Callable[[], None], heartbeat_s: float = HEARTBEAT_S) -> Iterator[None]:
        """Keep the acquired lease alive inside the block and release it then; call `on_lost` once if it is lost."""
        done = threading.Event()
        thread = threading.Thread(target=self._keep, args=(done, on_lost, heartbeat_s), name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(heartbeat_s)
            self.release()

    def _keep(self, done: threading.Event, on_lost: Callable[[], None], heartbeat_s: float) -> None:
        warned, last = False, time.monotonic()
        while not done.wait(heartbeat_s):
            try:
                with fewer_retries():
                    kept = self.beat()
                warned, last = False, time.monotonic()
            except Exception as error:
                if not warned:
                    LOG.warning(
                        "the lease of run %s could not be renewed: %s; tried again", self._name, one_line(error)
                    )
                warned = True
                if time.monotonic() - last < PATIENCE_S:
                    continue
                kept, self.lost = False, f"without its store for {PATIENCE_S / 60:.0f} minutes ({one_line(error)})"
            if not kept:
                on_lost()
                return
