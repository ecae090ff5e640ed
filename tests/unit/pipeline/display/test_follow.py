import io
import re
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

from pipeline.display.follow import RunView, follow
from pipeline.tracking.progress import RunProgress
from pipeline.tracking.tags import TAG_EPOCHS, TAG_PHASE, TAG_PROGRESS, TAG_TOTAL_STEPS, TAG_WARNING

FIGURES = {"train/loss": 5.4403, "speed/images_per_s": 146.62, "speed/memory_gib": 1.234, "epoch": 0.5}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def state(step: int, epoch: float, end: str = "", metrics: dict[str, float] | None = None, **tags: str) -> Any:
    """Return a run at this step."""
    all_tags = {TAG_TOTAL_STEPS: "3000", TAG_EPOCHS: "12", TAG_PROGRESS: RunProgress(step, epoch, end).to_json()}
    all_tags |= {TAG_PHASE: "training"} | tags
    return cast(Any, SimpleNamespace(data=SimpleNamespace(tags=all_tags, metrics=FIGURES | (metrics or {}))))


def fresh() -> Any:
    """Return a run that has just been created."""
    return cast(Any, SimpleNamespace(data=SimpleNamespace(tags={TAG_PHASE: "training"}, metrics={})))


def in_an_hour() -> str:
    return (datetime.now(UTC) + timedelta(hours=1, minutes=2, seconds=30)).isoformat(timespec="seconds")


def lines(*states: Any) -> list[str]:
    stream = io.StringIO()
    view = RunView(stream)
    for run in states:
        view.show(run)
    view.close()
    return stream.getvalue().splitlines()


def test_in_a_file_each_finished_epoch_is_one_line_of_figures() -> None:
    printed = lines(fresh(), state(200, 0.8), state(250, 1.0, in_an_hour(), {"val/AP": 0.3051}), state(300, 1.2))
    assert len(printed) == 2
    assert re.fullmatch(
        r"epoch   1/12  step    250/3000  loss    5\.440  AP 0\.305   146\.6 images/s  1\.23 GiB"
        r"  1h02m left, ends ((\w{3} )?\d\d:\d\d(:\d\d)?)",
        printed[0],
    )


def test_a_line_names_its_step_and_all_epochs_since_the_last_line() -> None:
    """Epochs may be shorter than the interval of the view, and steps are not derived from epochs."""
    printed = lines(fresh(), state(250, 1.0), state(1003, 4.2), state(1250, 5.0))
    assert [line.split("  loss")[0] for line in printed] == [
        "epoch   1/12  step    250/3000",
        "epoch 2-4/12  step   1003/3000",
        "epoch   5/12  step   1250/3000",
    ]


def test_without_a_forecast_a_line_has_no_end() -> None:
    assert lines(fresh(), state(250, 1.0))[0].endswith("GiB")


def test_on_a_terminal_a_live_bar_has_all_figures() -> None:
    stream = Terminal()
    view = RunView(stream)
    view.show(state(201, 0.804, in_an_hour(), {"val/AP": 0.3051}))
    view.close()
    text = stream.getvalue().replace("\r", "\n")
    for figure in ("training", "epoch 0.8/12", "step 201/3000", "5.440", "AP 0.305", "146.6 images/s", "1.23 GiB"):
        assert figure in text
    assert re.search(r"1h02m left, ends (\w{3} )?\d\d:\d\d", text)


def test_a_warning_is_one_line_per_cause_and_may_come_again() -> None:
    name = f"{TAG_WARNING}.data_wait"
    texts = ("", "waits 6%", "waits 6%", "", "waits 6%")
    printed = lines(*(state(0, 0.0, **{TAG_PHASE: "starting", TAG_WARNING: "restart 1", name: text}) for text in texts))
    assert printed == ["starting ..."] + ["warning: waits 6%"] * 2


def test_a_run_without_progress_is_shown_as_starting() -> None:
    run = SimpleNamespace(data=SimpleNamespace(tags={TAG_PHASE: "starting"}, metrics={}))
    assert lines(cast(Any, run), cast(Any, run)) == ["starting ..."]


BEFORE = {"val/AP": 0.3, "evaluation/epoch": 3.0}


def test_figures_of_an_earlier_attempt_are_not_printed() -> None:
    old = datetime.now(UTC).isoformat(timespec="seconds")
    resumed = [state(800, 3.2, old, BEFORE, **{TAG_PHASE: "starting"}), state(800, 3.2, old, BEFORE)]
    assert lines(*resumed) == ["starting ..."]
    stream = Terminal()
    view = RunView(stream)
    for run in resumed:
        view.show(run)
    view.close()
    assert "left, ends" not in stream.getvalue()
    printed = lines(*resumed, state(900, 3.6, "", BEFORE), state(1000, 4.0, "", BEFORE | {"evaluation/epoch": 4.0}))
    assert [line[:23].strip() for line in printed] == ["starting ...", "epoch   4/12  step   10", "evaluated at"]


def test_epochs_that_end_again_after_a_resume_are_printed_again() -> None:
    printed = lines(state(800, 3.2, "", **{TAG_PHASE: "starting"}), state(600, 2.4), state(750, 3.0))
    assert [line.split("  step")[0] for line in printed] == ["starting ...", "epoch   3/12"]


def test_a_view_opened_during_a_run_prints_the_current_state_once() -> None:
    (line,) = lines(*[state(350, 1.4, in_an_hour(), BEFORE)] * 3)
    assert line.startswith("epoch 1.4/12  step    350/3000  loss    5.440  AP 0.300")
    assert "left, ends" in line


def test_a_run_shorter_than_an_epoch_prints_its_loss_at_the_end() -> None:
    printed = lines(fresh(), state(5, 0.02, in_an_hour()), state(10, 0.04))
    assert printed == ["epoch 0.0/12  step     10/3000  loss    5.440   146.6 images/s  1.23 GiB"]


def test_each_step_that_the_guard_skips_is_a_warning() -> None:
    warnings = {f"{TAG_WARNING}.guard.{n}": f"step {n} left out: no ({n} of 3)" for n in (1, 2)}
    printed = lines(fresh(), state(0, 0.0, "", **warnings), state(0, 0.0, "", **warnings))
    assert printed[:2] == ["warning: step 1 left out: no (1 of 3)", "warning: step 2 left out: no (2 of 3)"]


def test_each_new_warning_is_one_line_but_not_earlier_ones() -> None:
    stream = io.StringIO()
    view = RunView(stream)
    for warning in ("of an earlier attempt", "of an earlier attempt", "no answer", "no answer", "restart 1"):
        run = SimpleNamespace(data=SimpleNamespace(tags={TAG_WARNING: warning}, metrics={}))
        view.show(cast(Any, run))
    lines = [line for line in stream.getvalue().splitlines() if "warning" in line]
    assert lines == ["warning: no answer", "warning: restart 1"]


class Store:
    """A client whose answers are runs, or errors that it raises."""

    def __init__(self, *answers: Any) -> None:
        self._answers = list(answers)

    def get_run(self, _: str) -> Any:
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_an_outage_of_mlflow_is_told_on_the_line_and_in_the_bar_and_so_is_its_end() -> None:
    away = ConnectionRefusedError(111, "Connection refused")
    ended = state(300, 1.2)
    ended.info = SimpleNamespace(status="FINISHED")
    running = state(250, 1.0)
    running.info = SimpleNamespace(status="RUNNING")
    for stream in (io.StringIO(), Terminal()):
        store = cast(Any, Store(running, away, away, ended))
        follow(store, "id", stream, interval_s=0, comfort="training continues, nothing is lost")
        shown = stream.getvalue()
        told = r"MLflow does not answer since \d\d:\d\d \(connection refused\); training continues, nothing is lost"
        assert len(re.findall(rf"{told}\n", shown)) == 1
        assert len(re.findall(r"MLflow answers again after \d+ s\n", shown)) == 1
    assert re.search(rf"\| {told}", shown)  # beside the bar as well


def test_an_evaluation_of_stuff_alone_is_printed() -> None:
    measured = {"val/PQ": 0.42, "evaluation/epoch": 1.0}
    printed = lines(state(200, 0.8), state(250, 1.0, "", measured))
    assert printed[-1].strip() == "evaluated at epoch 1:  PQ 0.420"
