"""View of a run in a terminal: a live bar, and a line per epoch and per evaluation.

All of it is read from the tracking store, so the driver, another terminal and another machine show the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from pipeline.display.terminal import clock_time, time_left
from pipeline.tracking.mlflow_client import unavailable
from pipeline.tracking.progress import RunProgress, read_progress
from pipeline.tracking.server.outage import Outage
from pipeline.tracking.tags import TAG_EPOCHS, TAG_PHASE, TAG_RESIZED, TAG_TOTAL_STEPS, TAG_WARNING

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

FINAL = ("FINISHED", "FAILED", "KILLED")


class RunView:
    """Bar and lines on `stream` from successive states of a run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: Any = None
        self._live = stream.isatty()  # no bar in a file; the lines have the same values
        self._printed: RunProgress | None = None
        self._evaluated: float | None = None
        # Progress that an earlier attempt has left, until this attempt has its own.
        self._stale: RunProgress | None = None
        self._last: tuple[RunProgress, int, float, dict[str, float]] | None = None
        self._printed_phase = ""
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
            # From before this view was opened: only the current state is printed, below.
            self._evaluated = evaluated
        if phase.startswith("starting"):
            self._stale = self._printed = progress
        fresh = progress if progress != self._stale else None
        if self._live:
            self._update_bar(fresh or RunProgress(0, 0.0), total, epochs, phase, metrics if fresh else {})
        elif phase.split(" ")[0] != self._printed_phase and phase.startswith("starting"):
            self._printed_phase = phase.split(" ")[0]
            self._line(f"{phase} ...")
        self._warn({name: text for name, text in tags.items() if name.startswith((TAG_WARNING, TAG_RESIZED))})
        if fresh and "train/loss" in metrics:
            self._last = fresh, total, epochs, dict(metrics)
            if first:
                self._print_position(phase == "training")
            else:
                self._print_epochs(fresh, total, epochs, metrics)
        # Data of stuff alone has a PQ and no AP.
        if evaluated > self._evaluated and ("val/AP" in metrics or "val/PQ" in metrics):
            self._evaluated = evaluated
            names = [name for name in ("AP", "AP50", "AP75", "mask_AP", "PQ") if f"val/{name}" in metrics]
            scores = "  ".join(f"{name.replace('_', ' ')} {metrics[f'val/{name}']:.3f}" for name in names)
            self._line(f"          evaluated at epoch {evaluated:g}:  {scores}")

    def _print_epochs(self, progress: RunProgress, total: int, epochs: float, metrics: dict[str, float]) -> None:
        """Print a line if epochs have ended since the last call: one for all of them."""
        before = int(self._printed.epoch + 1e-9) if self._printed else 0
        now = int(progress.epoch + 1e-9)
        if now <= before:
            if self._printed and progress.step < self._printed.step:
                self._printed = progress  # continued from an earlier checkpoint: these epochs end again
            return
        self._printed = progress
        ended = f"{now:>3}" if now == before + 1 or before == 0 else f"{before + 1}-{now}".rjust(3)
        figures = "  ".join(_figures(progress, metrics))
        self._line(f"epoch {ended}/{epochs:g}  step {progress.step:>6}/{total}  {figures}")

    def _print_position(self, running: bool) -> None:
        """Print a line of the last state unless it was printed, with the predicted end if the run is `running`."""
        if self._last is None or (self._printed and self._printed.step == self._last[0].step):
            return
        progress, total, epochs, metrics = self._last
        self._printed = progress
        without_end = RunProgress(progress.step, progress.epoch)
        figures = "  ".join(_figures(progress if running else without_end, metrics))
        self._line(f"epoch {progress.epoch:>3.1f}/{epochs:g}  step {progress.step:>6}/{total}  {figures}")

    def close(self) -> None:
        """Print the last state if it is new, and remove the bar."""
        self._print_position(running=False)
        if self._bar is not None:
            self._bar.close()

    def _update_bar(
        self, progress: RunProgress, total: int, epochs: float, phase: str, metrics: dict[str, float]
    ) -> None:
        if self._bar is None:
            # tqdm's own forecast would ignore evaluations and the time before this view was opened.
            form = "{percentage:3.0f}%|{bar:8}| {desc}"
            self._bar = tqdm(total=total, file=self._stream, dynamic_ncols=True, leave=False, bar_format=form)
        self._bar.total, self._bar.n = total, progress.step
        position = [f"epoch {progress.epoch:.1f}/{epochs:g}", f"step {progress.step}/{total}"]
        text = " ".join([phase, *position, *_figures(progress, metrics)])
        # Without double spaces: a terminal cuts off what does not fit.
        self._bar.set_description_str(" ".join(text.split()), refresh=True)

    def tell_outage(self, line: str, state: str) -> None:
        """Print a line about MLflow, if any, and show `state` in the bar for as long as MLflow does not answer."""
        if line:
            self._line(line)
        if state and self._bar is not None:
            self._bar.set_description_str(state, refresh=True)

    def _warn(self, warnings: dict[str, str]) -> None:
        for name, text in warnings.items():
            # The first warnings are from before this view was opened.
            if self._warnings is not None and text not in ("", self._warnings.get(name)):
                self._line(text if name == TAG_RESIZED else f"warning: {text}")
        self._warnings = warnings

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)


def _figures(progress: RunProgress, metrics: dict[str, float]) -> list[str]:
    """Return loss, AP, speed, memory and predicted end as texts, as far as they are known."""
    formats = {
        "train/loss": "loss {:8.3f}",
        "val/AP": "AP {:.3f}",
        "val/mask_AP": "mask AP {:.3f}",
        "val/PQ": "PQ {:.3f}",
        "speed/images_per_s": "{:6.1f} images/s",
        "speed/memory_gib": "{:.2f} GiB",
    }
    figures = [text.format(metrics[name]) for name, text in formats.items() if name in metrics]
    end = progress.ends
    if end:
        figures.append(f"{time_left(end)} left, ends {clock_time(end)}")
    return figures


def follow(
    client: MlflowClient,
    run_id: str,
    stream: TextIO,
    *,
    stop: threading.Event | None = None,
    interval_s: float = 1.0,
    comfort: str = "",
    seen: Callable[[Run], None] = lambda _: None,
) -> None:
    """Show a run until it ends or `stop` is set; a store that does not answer is told once, and asked again.

    `comfort` says what becomes of the run meanwhile. `seen` gets each state of the run.
    """
    view, stop, outage = RunView(stream), stop or threading.Event(), Outage(comfort)
    try:
        while True:
            stopping = stop.wait(interval_s)
            try:
                run = client.get_run(run_id)
                view.tell_outage(outage.answered(), "")
                view.show(run)
                seen(run)
            except unavailable() as error:
                view.tell_outage(outage.failed(error), outage.text)
                run = None
            if stopping or (run is not None and run.info.status in FINAL):
                return
    finally:
        view.close()
