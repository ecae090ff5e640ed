"""How far a run is and when it will end: the tag that the workers set and that people's views read."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

import msgspec

TAG_PROGRESS = "detr.progress"


class Progress(msgspec.Struct, omit_defaults=True):
    """A run at its last log point; `end`: when it will end, ISO 8601, empty as long as it is too early to say."""

    step: int
    epoch: float
    end: str = ""

    def to_json(self) -> str:
        """The tag's text."""
        return msgspec.json.encode(self).decode()

    @property
    def ends(self) -> datetime | None:
        """The predicted end, with its time zone."""
        return datetime.fromisoformat(self.end) if self.end else None


def read_progress(tags: Mapping[str, str]) -> Progress | None:
    """How far the run of these tags is; None before its first log point."""
    text = tags.get(TAG_PROGRESS)
    return msgspec.json.decode(text, type=Progress) if text else None


def left(end: datetime) -> str:
    """The time until `end`: `41s`, `12m40s`, `5h02m` or `3d04h`."""
    seconds = max(round((end - datetime.now(UTC)).total_seconds()), 0)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds // 60 % 60:02}m"
    return f"{seconds // 86400}d{seconds // 3600 % 24:02}h"


def clock_time(end: datetime) -> str:
    """`end` on this machine's clock: the hour, with the day where it is not today."""
    here, now = end.astimezone(), datetime.now().astimezone()
    if here.date() == now.date():
        return here.strftime("%H:%M:%S")
    return here.strftime("%a %H:%M" if here - now < timedelta(days=6) else "%Y-%m-%d %H:%M")
