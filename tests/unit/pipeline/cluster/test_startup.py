"""The timeline that the driver prints after the first step."""

import time

from pipeline.cluster.startup import FirstStep, printed_timeline
from tests.support.notes import memory_notes


def test_the_driver_prints_its_marks_and_those_of_rank_0_once() -> None:
    notes, printed = memory_notes(), list[str]()
    first_step = FirstStep(notes)
    with printed_timeline(notes, printed.append):
        first_step()
        first_step()
        until = time.monotonic() + 60
        while not any("process of rank 0 started" in line for line in printed):
            assert time.monotonic() < until
            time.sleep(0.02)
    lines = "\n".join(printed)
    assert lines.count("process of rank 0 started") == lines.count("command started") == 1
    assert "first step done" in lines
