"""AP of a recipe by CPU seconds, trained in this process: `python -m tests.bench.convergence RECIPE --any.field value ...`.

Neither Ray nor MLflow runs, so the seconds are those of one worker with its reading and its evaluations, and those of two
recipes compare even while other programs use the machine. OMP_NUM_THREADS is the number of torch's threads. Figures belong
in `docs/ledger.md`.
"""

import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from jobs.training import fitted, parse_train
from pipeline.distributed.ranks import Ranks
from pipeline.driver.preflight import prepare
from pipeline.training.loop import run
from pipeline.training.state import RunInfo
from tests.support.tracker import MemoryTracker


class _Printer(MemoryTracker):
    """Tracker that prints a line about each evaluation."""

    def __init__(self, epochs_per_step: float) -> None:
        super().__init__()
        self._epochs_per_step = epochs_per_step
        self._start_s = time.process_time()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        super().metrics(values, step)
        if "val/AP" not in values:
            return
        epoch, seconds = step * self._epochs_per_step, time.process_time() - self._start_s
        print(
            f"epoch {epoch:6.1f}  step {step:6}  CPU {seconds:7.1f} s  "
            f"AP {values['val/AP']:.4f}  AP50 {values['val/AP50']:.4f}",
            flush=True,
        )


def main(argv: list[str]) -> None:
    options = parse_train(argv, "python -m tests.bench.convergence")
    if options is None:
        return
    config = fitted(options.config, argv, print)
    config, prepared = prepare(replace(config, cluster=replace(config.cluster, workers=1)), print)
    images = prepared.train.images
    print(f"{images} images, {prepared.val.images} for validation, {prepared.schedule.total_steps} steps", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        prepared.write_initial_weights(Path(folder))
        run(
            config,
            RunInfo("convergence", Path(folder), ""),
            Ranks(),
            _Printer(config.optim.batch_size / images),
        )


if __name__ == "__main__":
    main(sys.argv[1:])
