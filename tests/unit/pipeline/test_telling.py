import io
import logging
from types import SimpleNamespace
from typing import Any, cast

from pipeline.follow import RunView
from pipeline.telling import telling_warnings
from pipeline.track import TAG_WARNING, MemoryTracker


def test_warnings_of_the_data_plane_are_told_while_the_block_lasts() -> None:
    tracker, logger = MemoryTracker(), logging.getLogger("shards.retry")
    with telling_warnings(tracker):
        logger.warning("%s does not answer", "s3://shards")
        logger.info("fetched")
    assert tracker.last_tags == {TAG_WARNING: "s3://shards does not answer"}
    logger.warning("later")
    assert tracker.last_tags == {TAG_WARNING: "s3://shards does not answer"}


def test_each_new_warning_is_one_line_and_those_of_before_are_none() -> None:
    stream = io.StringIO()
    view = RunView(stream)
    for warning in ("of an earlier attempt", "of an earlier attempt", "no answer", "no answer", "restart 1"):
        run = SimpleNamespace(data=SimpleNamespace(tags={TAG_WARNING: warning}, metrics={}))
        view.show(cast(Any, run))
    told = [line for line in stream.getvalue().splitlines() if "warning" in line]
    assert told == ["warning: no answer", "warning: restart 1"]
