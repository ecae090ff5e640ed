import io
import logging
from types import SimpleNamespace
from typing import Any, cast

from pipeline.display.follow import RunView
from pipeline.tracking.tags import TAG_WARNING
from pipeline.tracking.tracker import MemoryTracker, forward_warnings


def test_warnings_about_data_are_reported_inside_the_block() -> None:
    tracker, logger = MemoryTracker(), logging.getLogger("shards.store.retry")
    with forward_warnings(tracker):
        logger.warning("%s does not answer", "s3://shards")
        logger.info("fetched")
    assert tracker.last_tags == {TAG_WARNING: "s3://shards does not answer"}
    logger.warning("later")
    assert tracker.last_tags == {TAG_WARNING: "s3://shards does not answer"}


def test_each_new_warning_is_one_line_but_not_earlier_ones() -> None:
    stream = io.StringIO()
    view = RunView(stream)
    for warning in ("of an earlier attempt", "of an earlier attempt", "no answer", "no answer", "restart 1"):
        run = SimpleNamespace(data=SimpleNamespace(tags={TAG_WARNING: warning}, metrics={}))
        view.show(cast(Any, run))
    told = [line for line in stream.getvalue().splitlines() if "warning" in line]
    assert told == ["warning: no answer", "warning: restart 1"]
