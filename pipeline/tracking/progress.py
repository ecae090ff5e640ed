"""Progress of a run and forecast of its end."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from datetime import datetime

import msgspec

from pipeline.config import RunConfig
from pipeline.schedule import Schedule, next_evaluation
from pipeline.tracking.tags import TAG_PROGRESS

_FIRST = 200  # steps before the first forecast, or a tenth of a run of less than 2000
_WINDOW = 1000  # steps that the mean is taken over


class Forecast:
    """Estimate of the remaining seconds from measured intervals and evaluations."""

    def __init__(self, config: RunConfig, schedule: Schedule, val_images: int, workers: int = 1) -> None:
        self._config, self._schedule = config, schedule
        self._images = min(val_images, config.evaluate.limit or val_images)
        self._asynchronous = config.evaluate.asynchronous
        self._workers = workers
        self._intervals: deque[tuple[int, float]] = deque()
        self._taken = 0
        self._forward_s = 0.0
        self._evaluation_s: float | None = None

    def stepped(self, steps: int, seconds: float, forward_s: float) -> None:
        """Record that `steps` steps took `seconds`; `forward_s` is the forward time per step."""
        if self._taken == self._in_window():
            self._intervals.clear()  # drop the first interval: it starts threads and fills buffers
        self._taken += steps
        self._forward_s = forward_s
        self._intervals.append((steps, seconds))
        while self._in_window() - self._intervals[0][0] >= _WINDOW:
            self._intervals.popleft()

    def evaluated(self, seconds: float) -> None:
        """Record the seconds that training waited for an evaluation."""
        self._evaluation_s = seconds

    def remaining_s(self, step: int) -> float | None:
        """Return the seconds from `step` to the end, an evaluation due at `step` included; None if it is too early."""
        total = self._schedule.total_steps
        if self._taken < min(_FIRST, max(total // 10, 1)):
            return None
        step_s = sum(seconds for _, seconds in self._intervals) / self._in_window()
        evaluation_s = self._evaluation_s
        if evaluation_s is None:
            evaluation_s = self._forward_s * self._images / self._config.optim.batch_size
            if self._asynchronous:
                evaluation_s *= self._workers
        return (total - step) * step_s + self._evaluations_from(step) * evaluation_s

    def _in_window(self) -> int:
        return sum(steps for steps, _ in self._intervals)

    def _evaluations_from(self, step: int) -> int:
        if self._asynchronous:
            return 1
        count, at, total = 0, step - 1, self._schedule.total_steps
        while at < total:
            at = next_evaluation(self._config, self._schedule, at)
            count += 1
        return count


class RunProgress(msgspec.Struct, omit_defaults=True):
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


def read_progress(tags: Mapping[str, str]) -> RunProgress | None:
    """Return the progress from a run's tags; None before its first log point."""
    text = tags.get(TAG_PROGRESS)
    return msgspec.json.decode(text, type=RunProgress) if text else None
