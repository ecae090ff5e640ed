"""Prediction of when a run ends, from the time that its steps and evaluations have taken.

The remaining steps count with the mean of the last ones, checkpoint stalls included, and the remaining evaluations with
the time of the last one. Before the first evaluation, its time is estimated from the forward pass. Of evaluations in
the background only the last one is waited for, and it runs in one process instead of on all workers.
"""

from __future__ import annotations

from collections import deque

from pipeline.boundaries import next_evaluation
from pipeline.config import RunConfig
from pipeline.optim import Schedule

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
