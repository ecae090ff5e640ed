from datetime import UTC, date, datetime, time, timedelta

import pytest

from pipeline.display.terminal import clock_time, time_left


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0s"), (41, "41s"), (760, "12m40s"), (18_120, "5h02m"), (3 * 86_400 + 4 * 3600, "3d04h")],
)
def test_the_remaining_time_has_at_most_two_units(seconds: float, text: str) -> None:
    assert time_left(datetime.now(UTC) + timedelta(seconds=seconds + 0.3)) == text


def test_the_end_is_in_local_time_with_the_day_unless_it_is_today() -> None:
    # A day at a time, as a change to summer time may lie between.
    today, soon, late = (
        datetime.combine(date.today() + timedelta(days=days), time(12, 5, 9)).astimezone(UTC) for days in (0, 2, 40)
    )
    assert clock_time(today) == "12:05:09"
    assert clock_time(soon) == soon.strftime("%a 12:05")
    assert clock_time(late) == late.strftime("%Y-%m-%d 12:05")
