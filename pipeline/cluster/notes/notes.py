"""Notes between the processes of a run: small records in the key-value store of the Ray cluster that they share.

    stop                driver, after Ctrl-C or SIGTERM           rank 0 and the background evaluation save and stop
    fatal               first worker with an error that recurs    the driver ends the run
    evaluation          newest task of the background evaluation  an older one that still runs ends
    attempts/NNNN.*     workers and Ray's controller              see `attempts`

The keys begin with the run's id and a number that the driver draws, so no process sees the notes of another driver. A
driver removes its notes at the end, and those that an earlier one left when it starts. Nothing depends on files that
several nodes see, nor on when a network file system shows them.

While the cluster does not answer there is no news: reading returns None, and the first failure is logged as a warning.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import msgspec

from shards.errors import one_line

LOG = logging.getLogger(__name__)
T = TypeVar("T")
_STOP, _FATAL = "stop", "fatal"


class NoteStore(Protocol):
    """Store of keys and values that all processes of a cluster see; raises `OSError` when it does not answer."""

    def put(self, key: str, value: bytes, overwrite: bool) -> None:
        """Store a value; without `overwrite` only if the key has none, so that the first writer wins."""

    def get(self, key: str) -> bytes | None:
        """Return the value of a key, or None."""

    def get_all(self, prefix: str) -> dict[str, bytes]:
        """Return the values of all keys with this prefix."""

    def delete(self, key: str) -> None:
        """Delete a key, if it exists."""

    def delete_all(self, prefix: str) -> None:
        """Delete all keys with this prefix."""


class _Outage:
    """State of this process: True while the store does not answer, so that one outage is one warning."""

    reported = False


class FatalError(msgspec.Struct, frozen=True):
    """Message of an error that a restart does not mend; `postpones`: the same command can continue the run later."""

    message: str
    postpones: bool = False


@dataclass(frozen=True)
class Notes:
    """Notes of one driver's run, the same in every process that gets a copy."""

    store: NoteStore
    run_id: str
    driver: str
    """Number that the driver has drawn."""

    @classmethod
    def of_run(cls, run_id: str, store: NoteStore) -> Notes:
        """Return the notes of a new driver; delete those that earlier drivers of the run have left."""
        notes = cls(store, run_id, secrets.token_hex(4))
        _answer(lambda: store.delete_all(f"{run_id}/"), None)
        return notes

    def read(self, name: str) -> bytes | None:
        """Return a note, or None if there is none or the cluster does not answer."""
        return _answer(lambda: self.store.get(self._key(name)), None)

    def read_all(self, prefix: str) -> dict[str, bytes] | None:
        """Return the notes whose names begin with `prefix`, by name; None if the cluster does not answer."""
        nothing: dict[str, bytes] | None = None
        found = _answer(lambda: self.store.get_all(self._key(prefix)), nothing)
        if found is None:
            return None
        return {key.removeprefix(self._key("")): value for key, value in found.items()}

    def write(self, name: str, value: bytes = b"", *, overwrite: bool = False) -> bool:
        """Write a note, unless it exists and `overwrite` is not given; return False if the cluster does not answer."""

        def put() -> bool:
            self.store.put(self._key(name), value, overwrite)
            return True

        return _answer(put, False)

    def delete(self, name: str) -> None:
        """Delete a note, if it exists."""
        _answer(lambda: self.store.delete(self._key(name)), None)

    def clear(self) -> None:
        """Delete all notes of this driver."""
        _answer(lambda: self.store.delete_all(self._key("")), None)

    def request_stop(self) -> bool:
        """Ask the workers to save and stop; return False if the cluster does not answer."""
        return self.write(_STOP)

    def stop_requested(self) -> bool:
        """Return True if the workers are asked to stop."""
        return self.read(_STOP) is not None

    def write_fatal_error(self, message: str, *, postpones: bool = False) -> None:
        """Tell the driver to end the run instead of restarting it; the first worker to write wins.

        `postpones`: the same command can continue it later. If the cluster does not answer, the driver learns of the
        error from Ray, after the restarts.
        """
        self.write(_FATAL, msgspec.json.encode(FatalError(message, postpones)))

    def read_fatal_error(self) -> FatalError | None:
        """Return the error that ends the run, or None."""
        error = self.read(_FATAL)
        return None if error is None else msgspec.json.decode(error, type=FatalError)

    def _key(self, name: str) -> str:
        return f"{self.run_id}/{self.driver}/{name}"


def _answer(ask: Callable[[], T], otherwise: T) -> T:
    """Return what `ask` returns, or `otherwise` with a warning when the cluster does not answer."""
    try:
        answer = ask()
    except OSError as error:
        if not _Outage.reported:
            LOG.warning("the Ray cluster does not answer (%s); requests to stop wait until it does", one_line(error))
        _Outage.reported = True
        return otherwise
    _Outage.reported = False
    return answer
