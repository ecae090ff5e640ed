"""A run as people watch it: one live bar, one line per epoch and per evaluation.

Everything comes from the tracking store, so the driver, another terminal and another machine see the same.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from pipeline.mlflow_store import TAG_EPOCHS, TAG_TOTAL_STEPS
from pipeline.standing import Progress, clock_time, left, read_progress
from pipeline.track import TAG_PHASE, TAG_RESIZED, TAG_WARNING

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

FINAL = ("FINISHED", "FAILED", "KILLED")


class RunView:
    """Turns successive states of a run into a bar and lines on `stream`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        # A bar in a file is noise; the lines say the same.
        self._bar: Any = None
        self._live = stream.isatty()
        self._told: Progress | None = None
        self._evaluated: float | None = None
        # The figures that an attempt before left, as long as this one has none of its own.
        self._stale: Progress | None = None
        self._last: tuple[Progress, int, float, dict[str, float]] | None = None
        self._said = ""
        self._warnings: dict[str, str] | None = None

    def show(self, run: Run) -> None:
        """Print what is new in this state of the run."""
        tags, metrics = run.data.tags, run.data.metrics
        total, epochs = int(tags.get(TAG_TOTAL_STEPS, 0)), float(tags.get(TAG_EPOCHS, 1))
        progress = read_progress(tags)
        phase = tags.get(TAG_PHASE, "starting")
        evaluated = metrics.get("evaluation/epoch", -1.0)
        first = self._evaluated is None
        if self._evaluated is None:
            # Of before this view was opened: where the run stands is said once, below.
            self._evaluated = evaluated
        if phase.startswith("starting"):
            self._stale = self._told = progress
        fresh = progress if progress != self._stale else None
        if self._live:
            self._update_bar(fresh or Progress(0, 0.0), total, epochs, phase, metrics if fresh else {})
        elif phase.split(" ")[0] != self._said and phase.startswith("starting"):
            self._said = phase.split(" ")[0]
            self._line(f"{phase} ...")
        self._warn({name: text for name, text in tags.items() if name.startswith((TAG_WARNING, TAG_RESIZED))})
        if fresh and "train/loss" in metrics:
            self._last = fresh, total, epochs, dict(metrics)
            if first:
                self._tell_standing(phase == "training")
            else:
                self._tell_epochs(fresh, total, epochs, metrics)
        if evaluated > self._evaluated and "val/AP" in metrics:
            self._evaluated = evaluated
            told = f"AP {metrics['val/AP']:.3f}  AP50 {metrics.get('val/AP50', -1):.3f}  AP75 {metrics.get('val/AP75', -1):.3f}"
            if "val/mask_AP" in metrics:
                told += f"  mask AP {metrics['val/mask_AP']:.3f}"
            self._line(f"          evaluated at epoch {evaluated:g}:  {told}")

    def _tell_epochs(self, progress: Progress, total: int, epochs: float, metrics: dict[str, float]) -> None:
        """A line when an epoch has ended; one line for all that have ended since the store was last asked."""
        before = int(self._told.epoch + 1e-9) if self._told else 0
        now = int(progress.epoch + 1e-9)
        if now <= before:
            if self._told and progress.step < self._told.step:
                self._told = progress  # gone on from an earlier checkpoint: its epochs end again
            return
        self._told = progress
        ended = f"{now:>3}" if now == before + 1 or before == 0 else f"{before + 1}-{now}".rjust(3)
        said = "  ".join(_figures(progress, metrics))
        self._line(f"epoch {ended}/{epochs:g}  step {progress.step:>6}/{total}  {said}")

    def _tell_standing(self, goes_on: bool) -> None:
        """A line of the last state, unless the last line was; with the forecast where the run goes on."""
        if self._last is None or (self._told and self._told.step == self._last[0].step):
            return
        progress, total, epochs, metrics = self._last
        self._told = progress
        said = "  ".join(_figures(progress if goes_on else Progress(progress.step, progress.epoch), metrics))
        self._line(f"epoch {progress.epoch:>3.1f}/{epochs:g}  step {progress.step:>6}/{total}  {said}")

    def close(self) -> None:
        """Say where the run has come to, where that is news, and leave the terminal clean."""
        self._tell_standing(goes_on=False)
        if self._bar is not None:
            self._bar.close()

    def _update_bar(self, progress: Progress, total: int, epochs: float, phase: str, metrics: dict[str, float]) -> None:
        if self._bar is None:
            # The bar's own forecast knows of neither evaluations nor what it took before it was opened.
            form = "{percentage:3.0f}%|{bar:8}| {desc}"
            self._bar = tqdm(total=total, file=self._stream, dynamic_ncols=True, leave=False, bar_format=form)
        self._bar.total, self._bar.n = total, progress.step
        said = [f"epoch {progress.epoch:.1f}/{epochs:g}", f"step {progress.step}/{total}", *_figures(progress, metrics)]
        # As narrow as it can be: what a terminal has no room for is lost.
        self._bar.set_description_str(" ".join(" ".join([phase, *said]).split()), refresh=True)

    def _warn(self, warnings: dict[str, str]) -> None:
        for name, text in warnings.items():
            # The first are of before this view was opened.
            if self._warnings is not None and text not in ("", self._warnings.get(name)):
                self._line(text if name == TAG_RESIZED else f"warning: {text}")
        self._warnings = warnings

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)


def _figures(progress: Progress, metrics: dict[str, float]) -> list[str]:
    """What is known of: loss, AP, speed, memory, end."""
    said = [f"loss {metrics['train/loss']:8.3f}"] if "train/loss" in metrics else []
    said += [f"AP {metrics['val/AP']:.3f}"] if "val/AP" in metrics else []
    said += [f"mask AP {metrics['val/mask_AP']:.3f}"] if "val/mask_AP" in metrics else []
    said += [f"{metrics['speed/images_per_s']:6.1f} images/s"] if "speed/images_per_s" in metrics else []
    said += [f"{metrics['speed/memory_gib']:.2f} GiB"] if "speed/memory_gib" in metrics else []
    end = progress.ends
    return said + ([f"{left(end)} left, ends {clock_time(end)}"] if end else [])


def follow(
    client: MlflowClient,
    run_id: str,
    stream: TextIO,
    *,
    stop: threading.Event | None = None,
    interval_s: float = 1.0,
) -> None:
    """Watch a run until it ends, or until `stop` is set.

    A store that does not answer for a while is asked again: watching never ends a run.
    """
    from mlflow.exceptions import MlflowException

    view, stop = RunView(stream), stop or threading.Event()
    try:
        while True:
            stopping = stop.wait(interval_s)
            try:
                run = client.get_run(run_id)
                view.show(run)
            except (MlflowException, OSError):
                time.sleep(interval_s)
                run = None
            if stopping or (run is not None and run.info.status in FINAL):
                return
    finally:
        view.close()
