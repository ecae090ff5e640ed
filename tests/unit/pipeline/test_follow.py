import io
import re
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

from pipeline.follow import RunView
from pipeline.mlflow_store import TAG_EPOCHS, TAG_TOTAL_STEPS
from pipeline.standing import TAG_PROGRESS, Progress
from pipeline.track import TAG_PHASE, TAG_WARNING

FIGURES = {"train/loss": 5.4403, "speed/images_per_s": 146.62, "speed/memory_gib": 1.234, "epoch": 0.5}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def state(step: int, epoch: float, end: str = "", metrics: dict[str, float] | None = None, **tags: str) -> Any:
    """A run in the store."""
    said = {TAG_TOTAL_STEPS: "3000", TAG_EPOCHS: "12", TAG_PROGRESS: Progress(step, epoch, end).to_json()}
    said |= {TAG_PHASE: "training"} | tags
    return cast(Any, SimpleNamespace(data=SimpleNamespace(tags=said, metrics=FIGURES | (metrics or {}))))


def in_an_hour() -> str:
    return (datetime.now(UTC) + timedelta(hours=1, minutes=2, seconds=30)).isoformat(timespec="seconds")


def lines(*states: Any) -> list[str]:
    stream = io.StringIO()
    view = RunView(stream)
    for one in states:
        view.show(one)
    view.close()
    return stream.getvalue().splitlines()


def test_in_a_file_an_epoch_that_has_ended_is_one_line_with_every_figure() -> None:
    said = lines(state(200, 0.8), state(250, 1.0, in_an_hour(), {"val/AP": 0.3051}), state(300, 1.2))
    assert len(said) == 1
    assert re.fullmatch(
        r"epoch   1/12  step    250/3000  loss    5\.440  AP 0\.305   146\.6 images/s  1\.23 GiB"
        r"  1h02m left, ends ((\w{3} )?\d\d:\d\d(:\d\d)?)",
        said[0],
    )


def test_a_line_names_the_step_of_its_figures_and_every_epoch_that_ended_since_the_last() -> None:
    """Epochs may be shorter than the interval at which the store is asked; steps are not derived from epochs."""
    said = lines(state(250, 1.0), state(1003, 4.2), state(1250, 5.0))
    assert [line.split("  loss")[0] for line in said] == [
        "epoch   1/12  step    250/3000",
        "epoch 2-4/12  step   1003/3000",
        "epoch   5/12  step   1250/3000",
    ]


def test_without_a_forecast_a_line_names_no_end() -> None:
    assert lines(state(250, 1.0))[0].endswith("GiB")


def test_on_a_terminal_one_line_lives_and_says_everything() -> None:
    stream = Terminal()
    view = RunView(stream)
    view.show(state(201, 0.804, in_an_hour(), {"val/AP": 0.3051}))
    view.close()
    said = stream.getvalue().replace("\r", "\n")
    for part in ("training", "epoch 0.8/12", "step 201/3000", "5.440", "AP 0.305", "146.6 images/s", "1.23 GiB"):
        assert part in said
    assert re.search(r"1h02m left, ends (\w{3} )?\d\d:\d\d", said)


def test_a_warning_is_one_line_per_cause_and_may_come_again() -> None:
    name = f"{TAG_WARNING}.data_wait"
    texts = ("", "waits 6%", "waits 6%", "", "waits 6%")
    said = lines(*(state(10, 0.1, **{TAG_WARNING: "restart 1", name: text}) for text in texts))
    assert said == ["warning: waits 6%"] * 2


def test_a_run_that_has_told_nothing_yet_is_shown_as_starting() -> None:
    run = SimpleNamespace(data=SimpleNamespace(tags={TAG_PHASE: "starting"}, metrics={}))
    assert lines(cast(Any, run), cast(Any, run)) == ["starting ..."]
