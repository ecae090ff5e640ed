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


def fresh() -> Any:
    """A run that has just been created."""
    return cast(Any, SimpleNamespace(data=SimpleNamespace(tags={TAG_PHASE: "training"}, metrics={})))


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
    said = lines(fresh(), state(200, 0.8), state(250, 1.0, in_an_hour(), {"val/AP": 0.3051}), state(300, 1.2))
    assert len(said) == 2
    assert re.fullmatch(
        r"epoch   1/12  step    250/3000  loss    5\.440  AP 0\.305   146\.6 images/s  1\.23 GiB"
        r"  1h02m left, ends ((\w{3} )?\d\d:\d\d(:\d\d)?)",
        said[0],
    )


def test_a_line_names_the_step_of_its_figures_and_every_epoch_that_ended_since_the_last() -> None:
    """Epochs may be shorter than the interval at which the store is asked; steps are not derived from epochs."""
    said = lines(fresh(), state(250, 1.0), state(1003, 4.2), state(1250, 5.0))
    assert [line.split("  loss")[0] for line in said] == [
        "epoch   1/12  step    250/3000",
        "epoch 2-4/12  step   1003/3000",
        "epoch   5/12  step   1250/3000",
    ]


def test_without_a_forecast_a_line_names_no_end() -> None:
    assert lines(fresh(), state(250, 1.0))[0].endswith("GiB")


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
    said = lines(*(state(0, 0.0, **{TAG_PHASE: "starting", TAG_WARNING: "restart 1", name: text}) for text in texts))
    assert said == ["starting ..."] + ["warning: waits 6%"] * 2


def test_a_run_that_has_told_nothing_yet_is_shown_as_starting() -> None:
    run = SimpleNamespace(data=SimpleNamespace(tags={TAG_PHASE: "starting"}, metrics={}))
    assert lines(cast(Any, run), cast(Any, run)) == ["starting ..."]


BEFORE = {"val/AP": 0.3, "evaluation/epoch": 3.0}


def test_what_an_attempt_before_left_is_not_told_as_news() -> None:
    old = datetime.now(UTC).isoformat(timespec="seconds")
    resumed = [state(800, 3.2, old, BEFORE, **{TAG_PHASE: "starting"}), state(800, 3.2, old, BEFORE)]
    assert lines(*resumed) == ["starting ..."]
    stream = Terminal()
    view = RunView(stream)
    for one in resumed:
        view.show(one)
    view.close()
    assert "left, ends" not in stream.getvalue()
    said = lines(*resumed, state(900, 3.6, "", BEFORE), state(1000, 4.0, "", BEFORE | {"evaluation/epoch": 4.0}))
    assert [line[:23].strip() for line in said] == ["starting ...", "epoch   4/12  step   10", "evaluated at"]


def test_epochs_that_end_again_after_a_resume_are_told_again() -> None:
    said = lines(state(800, 3.2, "", **{TAG_PHASE: "starting"}), state(600, 2.4), state(750, 3.0))
    assert [line.split("  step")[0] for line in said] == ["starting ...", "epoch   3/12"]


def test_who_looks_at_a_run_in_the_midst_is_told_once_where_it_stands() -> None:
    (said,) = lines(*[state(350, 1.4, in_an_hour(), BEFORE)] * 3)
    assert said.startswith("epoch 1.4/12  step    350/3000  loss    5.440  AP 0.300")
    assert "left, ends" in said


def test_a_run_shorter_than_an_epoch_says_its_loss_at_the_end() -> None:
    said = lines(fresh(), state(5, 0.02, in_an_hour()), state(10, 0.04))
    assert said == ["epoch 0.0/12  step     10/3000  loss    5.440   146.6 images/s  1.23 GiB"]


def test_each_step_that_the_guard_leaves_out_is_a_warning() -> None:
    told = {f"{TAG_WARNING}.guard.{n}": f"step {n} left out: no ({n} of 3)" for n in (1, 2)}
    said = lines(fresh(), state(0, 0.0, "", **told), state(0, 0.0, "", **told))
    assert said[:2] == ["warning: step 1 left out: no (1 of 3)", "warning: step 2 left out: no (2 of 3)"]
