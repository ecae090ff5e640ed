"""Events of a run as lines of JSON."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any

import msgspec

LOG = logging.getLogger(__name__)


class Event(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Line of the spool; which of the other fields are used depends on `kind`."""

    kind: str
    time_ms: int
    step: int = 0
    name: str = ""
    values: dict[str, float] = {}
    tags: dict[str, str] = {}
    columns: dict[str, list[Any]] = {}


def encode(event: Event) -> bytes:
    """Return the line of an event, with its end."""
    return msgspec.json.encode(event) + b"\n"


def decode(lines: Iterable[bytes], source: object) -> list[Event]:
    """Return the events of lines; skip a damaged one, which must neither stop a run nor block later lines."""
    events = []
    for line in lines:
        try:
            events.append(msgspec.json.decode(line, type=Event))
        except msgspec.DecodeError as error:
            LOG.warning("a damaged line of %s is skipped (%s)", source, error)
    return events


def now_ms() -> int:
    """Return the time of an event that happens now."""
    return time.time_ns() // 1_000_000
