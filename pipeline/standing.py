"""Progress of a run and its predicted end: a run tag that the workers set and the views read."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

import msgspec

TAG_PROGRESS = "detr.progress"


class Progress(msgspec.Struct, omit_defaults=True):
    """State of a run at its last log point; `end` is the predicted end in ISO 8601, empty if unknown."""

    step: int
    epoch: float
    end: str = ""

    def to_json(self) -> str:
        """Return the text of the tag."""
        return msgspec.json.encode(self).decode()

    @property
    def ends(self) -> datetime | None:
        """Predicted end, with its time zone."""
        return datetime.fromisoformat(self.end) if self.end else None


def read_progress(tags: Mapping[str, str]) -> Progress | None:
    """Return the progress from a run's tags; None before its first log point."""
    text = tags.get(TAG_PROGRESS)
    return msgspec.json.decode(text, type=Progress) if text else None


def left(end: datetime) -> str:
    """Return the time until `end` as text: `41s`, `12m40s`, `5h02m` or `3d04h`."""
    seconds = max(round((end - datetime.now(UTC)).total_seconds()), 0)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds // 60 % 60:02}m"
    return f"{seconds // 86400}d{seconds // 3600 % 24:02}h"


def clock_time(end: datetime) -> str:
    """Return `end` in local time as text, with the day or date unless it is today."""
    local, now = end.astimezone(), datetime.now().astimezone()
    if local.date() == now.date():
        return local.strftime("%H:%M:%S")
    return local.strftime("%a %H:%M" if local - now < timedelta(days=6) else "%Y-%m-%d %H:%M")
