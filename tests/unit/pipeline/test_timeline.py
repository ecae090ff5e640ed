"""Timeline of a start."""

import time

from pipeline.timeline import Mark, describe, mark, marks


def test_marks_are_printed_in_order_with_the_seconds_since_the_first() -> None:
    assert describe([Mark(105.25, "first step done"), Mark(100.0, "command started"), Mark(101.5, "Ray answers")]) == [
        "    0.0 s  command started",
        "    1.5 s  Ray answers",
        "    5.2 s  first step done",
    ]


def test_the_first_mark_is_the_start_of_the_process() -> None:
    mark("now")
    started, *_, last = marks("started")
    assert started.what == "started"
    assert started.at < last.at <= time.time()
    assert last.what == "now"
