"""Reports at the start of a run: the first global batch as the model sees it, and what the data hold.

They show the most frequent mistakes (wrong boxes, wrong sizes, validation data that differ) before hours are spent. A thread of
rank 0 makes them while all ranks train, from the plan and the index alone, and no run ends because of it.
"""

from __future__ import annotations

import logging
import threading
from contextlib import closing
from types import TracebackType

from PIL import Image

from pipeline.data.loader import global_batch
from pipeline.display.batches import BatchView
from pipeline.display.contents import contents_columns, contents_picture
from pipeline.tracking.tags import TAG_DATA
from pipeline.tracking.tracker import Tracker
from pipeline.training.state import WorkerContext
from shards.dataset.contents import contents, warning_lines
from shards.dataset.manifest import Manifest
from shards.errors import one_line

LOG = logging.getLogger(__name__)
_WAIT_S = 20.0


class FirstMinute:
    """Thread that reports at step 0 on rank 0; the end of the block waits for it, but seconds only for images left to draw."""

    def __init__(self, worker: WorkerContext, step: int) -> None:
        self._worker, self._stopped = worker, threading.Event()
        self._thread: threading.Thread | None = None
        if worker.tracker is not None and step == 0:
            self._thread = threading.Thread(target=self._report, args=(worker.tracker,), name="first", daemon=True)

    def __enter__(self) -> FirstMinute:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.join(_WAIT_S if kind is None else 0)
            self._stopped.set()
            self._thread.join()

    def _report(self, tracker: Tracker) -> None:
        try:
            report_contents(tracker, self._worker.train, self._worker.val)
            self._report_batch(tracker)
        except Exception as error:
            LOG.warning("the first batch or the contents of the data are not reported (%s)", one_line(error))

    def _report_batch(self, tracker: Tracker) -> None:
        worker = self._worker
        view = BatchView(worker.config.transform, [category.name for category in worker.train.categories])
        ranks = global_batch(worker.train, worker.config, worker.schedule, 0, worker.ranks.world_size)
        with closing(ranks):
            if not view.add_all(ranks, self._stopped.is_set):
                return
        # A palette takes a quarter of the space, and these are up to 256 images.
        tracker.picture("data/first_batch", view.picture().quantize(256, method=Image.Quantize.FASTOCTREE), 0)
        tracker.table("first_batch.json", view.columns, 0)


def report_contents(tracker: Tracker, train: Manifest, val: Manifest) -> None:
    """Report what both data sets hold, side by side, and warn if validation data differ from training data."""
    of_train, of_val = contents(train), contents(val)
    tracker.table("data_contents.json", contents_columns(of_train, of_val), 0)
    tracker.picture("data/contents", contents_picture(of_train, of_val), 0)
    lines = warning_lines(of_train, of_val)
    if lines:
        tracker.tags({TAG_DATA: "; ".join(lines)[:5000]})
