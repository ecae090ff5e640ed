"""A run as people watch it: one live bar, one line per epoch and per evaluation.

Everything comes from the tracking store, so the driver, another terminal and another machine see the same.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from pipeline.mlflow_store import TAG_EPOCHS, TAG_TOTAL_STEPS
from pipeline.track import TAG_PHASE, TAG_WARNING

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
        self._epoch = -1
        self._evaluated = -1.0
        self._said = ""
        self._warning: str | None = None

    def show(self, run: Run) -> None:
        """Print what is new in this state of the run."""
        tags, metrics = run.data.tags, run.data.metrics
        total, epochs = int(tags.get(TAG_TOTAL_STEPS, 0)), float(tags.get(TAG_EPOCHS, 1))
        epoch = metrics.get("epoch", 0.0)
        step = round(epoch / epochs * total)
        phase = tags.get(TAG_PHASE, "starting")
        if self._live:
            self._update_bar(step, total, phase, metrics)
        elif phase.split(" ")[0] != self._said and phase.startswith("starting"):
            self._said = phase.split(" ")[0]
            self._line(f"{phase} ...")
        self._warn(tags.get(TAG_WARNING, ""))
        if "train/loss" in metrics and int(epoch + 1e-9) > max(self._epoch, 0):
            self._epoch = int(epoch + 1e-9)
            speed = metrics.get("speed/images_per_s", 0.0)
            self._line(
                f"epoch {self._epoch:>3}/{epochs:g}  step {step:>6}/{total}  loss {metrics['train/loss']:8.3f}  {speed:6.1f} images/s"
            )
        evaluated = metrics.get("evaluation/epoch", -1.0)
        if evaluated > self._evaluated and "val/AP" in metrics:
            self._evaluated = evaluated
            told = f"AP {metrics['val/AP']:.3f}  AP50 {metrics.get('val/AP50', -1):.3f}  AP75 {metrics.get('val/AP75', -1):.3f}"
            if "val/mask_AP" in metrics:
                told += f"  mask AP {metrics['val/mask_AP']:.3f}"
            self._line(f"          evaluated at epoch {evaluated:g}:  {told}")

    def close(self) -> None:
        """Leave the terminal clean."""
        if self._bar is not None:
            self._bar.close()

    def _update_bar(self, step: int, total: int, phase: str, metrics: dict[str, float]) -> None:
        if self._bar is None:
            self._bar = tqdm(total=total, unit="step", file=self._stream, dynamic_ncols=True, leave=False, initial=step)
        self._bar.n = max(step, self._bar.n)
        said = {"loss": f"{metrics['train/loss']:.2f}"} if "train/loss" in metrics else {}
        said |= {"AP": f"{metrics['val/AP']:.3f}"} if "val/AP" in metrics else {}
        said |= {"mask AP": f"{metrics['val/mask_AP']:.3f}"} if "val/mask_AP" in metrics else {}
        self._bar.set_description_str(phase, refresh=False)
        self._bar.set_postfix(said, refresh=True)

    def _warn(self, warning: str) -> None:
        if self._warning is not None and warning not in ("", self._warning):
            self._line(f"warning: {warning}")
        self._warning = warning  # the first is of before this view was opened

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)


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
