"""The actor that stands for a trial in Ray Tune: it reports what the trial's process has written down."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec

from pipeline.sweep.process import ENDED, POINTS, Point

_LOOK_S = 1.0


class TrialFailed(Exception):
    """Raised in the actor of a trial whose process ended with another status than 0."""


def reports(folder: Path, sleep: Callable[[float], None] = time.sleep) -> Iterator[Point]:
    """Yield what a trial reports, until its process has ended; raise `TrialFailed` if that failed."""
    read = 0
    while True:
        ended = folder / ENDED
        status = ended.read_text() if ended.exists() else ""  # before the points, so that none comes after it
        content = (folder / POINTS).read_bytes() if (folder / POINTS).exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for line in whole[read:].splitlines():
            yield msgspec.json.decode(line, type=Point)
        read = len(whole)
        if status:
            if status != "0":
                raise TrialFailed(status)
            return
        sleep(_LOOK_S)


def watch(config: Mapping[str, str], *, folder: str, metric: str, epochs_per_step: Mapping[str, float]) -> None:
    """Report a trial to Ray Tune, which ends this function at a report if the trial is to stop."""
    from ray import tune

    of_step = epochs_per_step[config["trial"]]
    for point in reports(Path(folder) / config["trial"]):
        tune.report({metric: point.value, "step": point.step, "epoch": round(point.step * of_step, 4)})
