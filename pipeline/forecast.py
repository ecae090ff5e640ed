"""When a run will end, from what its steps and evaluations have taken.

It is a sum of what is left: so many steps at the mean of the last ones, checkpoint stalls included, and so many
evaluations at what one took. Until the first evaluation is over, it is taken for a forward pass over its images.
Where evaluations are made beside the training, only the last one is waited for, by one process instead of all.
"""

from __future__ import annotations

from collections import deque

from pipeline.boundaries import next_evaluation
from pipeline.config import RunConfig
from pipeline.optim import Schedule

_FIRST = 200  # steps after which there is a forecast; a tenth of a run that is shorter than ten times as many
_WINDOW = 1000  # steps whose mean is what a step will take


class Forecast:
    """Takes in what was measured, and says what is left."""

    def __init__(self, config: RunConfig, schedule: Schedule, val_images: int, workers: int = 1) -> None:
        self._config, self._schedule = config, schedule
        self._images = min(val_images, config.evaluate.limit or val_images)
        self._alone = config.evaluate.asynchronous
        self._workers = workers
        self._intervals: deque[tuple[int, float]] = deque()
        self._taken = 0
        self._forward_s = 0.0
        self._evaluation_s: float | None = None

    def stepped(self, steps: int, seconds: float, forward_s: float) -> None:
        """So many steps took so many seconds; `forward_s`: of a step, what its forward pass took."""
        if self._taken == self._in_window():
            self._intervals.clear()  # the first interval starts threads and fills buffers: out, as soon as there is another
        self._taken += steps
        self._forward_s = forward_s
        self._intervals.append((steps, seconds))
        while self._in_window() - self._intervals[0][0] >= _WINDOW:
            self._intervals.popleft()

    def evaluated(self, seconds: float) -> None:
        """An evaluation kept training waiting for so long."""
        self._evaluation_s = seconds

    def remaining_s(self, step: int) -> float | None:
        """Seconds from `step` to the end, the evaluation that is due at `step` included; None: too early to say."""
        total = self._schedule.total_steps
        if self._taken < min(_FIRST, max(total // 10, 1)):
            return None
        step_s = sum(seconds for _, seconds in self._intervals) / self._in_window()
        evaluation_s = self._evaluation_s
        if evaluation_s is None:
            evaluation_s = self._forward_s * self._images / self._config.optim.batch_size
            evaluation_s *= self._workers if self._alone else 1
        return (total - step) * step_s + self._evaluations_from(step) * evaluation_s

    def _in_window(self) -> int:
        return sum(steps for steps, _ in self._intervals)

    def _evaluations_from(self, step: int) -> int:
        if self._alone:
            return 1
        count, at, total = 0, step - 1, self._schedule.total_steps
        while at < total:
            at = next_evaluation(self._config, self._schedule, at)
            count += 1
        return count
