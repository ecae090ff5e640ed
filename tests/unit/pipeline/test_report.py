from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

from pipeline.report import metrics_table, runs_table
from pipeline.standing import TAG_PROGRESS, Progress, clock_time
from pipeline.track import TAG_PHASE
from shards.score import MASK_METRICS, METRICS


def test_the_figures_of_boxes_stand_alone_where_there_are_no_masks() -> None:
    lines = metrics_table(dict.fromkeys(METRICS, 0.25) | {"APl": -1.0}).splitlines()
    assert lines[0].split() == ["metric", "value", "of"]
    assert lines[2].split() == ["AP", "0.250", "IoU", "0.50:0.95"]
    assert lines[7].split()[:2] == ["APl", "-"]


def test_the_figures_of_masks_stand_next_to_those_of_boxes() -> None:
    metrics = dict.fromkeys(METRICS, 0.25) | dict.fromkeys(MASK_METRICS, 0.125) | {"mask_APl": -1.0}
    lines = metrics_table(metrics).splitlines()
    assert lines[0].split() == ["metric", "boxes", "masks", "of"]
    assert lines[2].split() == ["AP", "0.250", "0.125", "IoU", "0.50:0.95"]
    assert lines[7].split()[:3] == ["APl", "0.250", "-"]
    assert len(lines) == 14


def test_the_end_is_listed_of_runs_that_are_going_on() -> None:
    def tags(end: datetime) -> dict[str, str]:
        return {TAG_PHASE: "training", TAG_PROGRESS: Progress(7, 0.5, end.isoformat()).to_json()}

    end = datetime.now(UTC) + timedelta(hours=1)
    past = end - timedelta(hours=2)  # its driver is gone

    def run(status: str, tags: dict[str, str]) -> Any:
        info = SimpleNamespace(run_id="0123456789", run_name="one", status=status, start_time=0)
        return SimpleNamespace(info=info, data=SimpleNamespace(tags=tags, metrics={}))

    said = runs_table(
        [run("RUNNING", tags(end)), run("RUNNING", {}), run("FINISHED", tags(end)), run("RUNNING", tags(past))]
    ).splitlines()
    assert said[0].split()[-1] == "ends"
    assert [line.split()[-1] for line in said[2:]] == [clock_time(end).split()[-1], "-", "-", "-"]
