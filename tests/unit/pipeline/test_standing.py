from datetime import UTC, date, datetime, time, timedelta

import pytest

from pipeline.standing import TAG_PROGRESS, Progress, clock_time, left, read_progress


def test_what_is_told_is_what_is_read() -> None:
    for told in (Progress(7, 0.5), Progress(7, 0.5, "2031-05-04T03:02:01+00:00")):
        assert read_progress({TAG_PROGRESS: told.to_json()}) == told
    assert read_progress({}) is None
    assert told.ends == datetime(2031, 5, 4, 3, 2, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(-5, "0s"), (41, "41s"), (760, "12m40s"), (18_120, "5h02m"), (3 * 86_400 + 4 * 3600, "3d04h")],
)
def test_the_time_that_is_left_is_told_in_two_units_at_most(seconds: float, said: str) -> None:
    assert left(datetime.now(UTC) + timedelta(seconds=seconds + 0.3)) == said


def test_the_end_is_told_by_this_machine_s_clock_with_the_day_where_it_is_another() -> None:
    # A day at a time, as a change to summer time may lie between.
    today, soon, late = (
        datetime.combine(date.today() + timedelta(days=days), time(12, 5, 9)).astimezone(UTC) for days in (0, 2, 40)
    )
    assert clock_time(today) == "12:05:09"
    assert clock_time(soon) == soon.strftime("%a 12:05")
    assert clock_time(late) == late.strftime("%Y-%m-%d 12:05")
