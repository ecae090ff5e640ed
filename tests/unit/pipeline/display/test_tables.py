from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

from pipeline.display.tables import metrics_table, runs_table
from pipeline.display.terminal import clock_time
from pipeline.tracking.progress import RunProgress
from pipeline.tracking.tags import TAG_PHASE, TAG_PROGRESS
from shards.score.coco_eval import MASK_METRICS, METRICS


def test_without_masks_the_table_has_one_column_of_metrics() -> None:
    lines = metrics_table(dict.fromkeys(METRICS, 0.25) | {"APl": -1.0}).splitlines()
    assert lines[0].split() == ["metric", "value", "of"]
    assert lines[2].split() == ["AP", "0.250", "IoU", "0.50:0.95"]
    assert lines[7].split()[:2] == ["APl", "-"]


def test_metrics_of_masks_are_next_to_those_of_boxes() -> None:
    metrics = dict.fromkeys(METRICS, 0.25) | dict.fromkeys(MASK_METRICS, 0.125) | {"mask_APl": -1.0}
    lines = metrics_table(metrics).splitlines()
    assert lines[0].split() == ["metric", "boxes", "masks", "of"]
    assert lines[2].split() == ["AP", "0.250", "0.125", "IoU", "0.50:0.95"]
    assert lines[7].split()[:3] == ["APl", "0.250", "-"]
    assert len(lines) == 14


def test_only_running_runs_have_a_predicted_end() -> None:
    def tags(end: datetime) -> dict[str, str]:
        return {TAG_PHASE: "training", TAG_PROGRESS: RunProgress(7, 0.5, end.isoformat()).to_json()}

    end = datetime.now(UTC) + timedelta(hours=1)
    past = end - timedelta(hours=2)  # the driver is dead

    def run(status: str, tags: dict[str, str]) -> Any:
        info = SimpleNamespace(run_id="0123456789", run_name="one", status=status, start_time=0)
        return SimpleNamespace(info=info, data=SimpleNamespace(tags=tags, metrics={}))

    lines = runs_table(
        [run("RUNNING", tags(end)), run("RUNNING", {}), run("FINISHED", tags(end)), run("RUNNING", tags(past))]
    ).splitlines()
    assert lines[0].split()[-1] == "ends"
    assert [line.split()[-1] for line in lines[2:]] == [clock_time(end).split()[-1], "-", "-", "-"]


def test_pq_has_a_column_if_a_run_has_it() -> None:
    def run(metrics: dict[str, float]) -> Any:
        info = SimpleNamespace(run_id="0123456789", run_name="one", status="FINISHED", start_time=0)
        return SimpleNamespace(info=info, data=SimpleNamespace(tags={}, metrics=metrics))

    boxes, segments = {"epoch": 2, "val/AP": 0.5, "val/AP50": 0.75}, {"val/AP": 0.25, "val/AP50": 0.5, "val/PQ": 0.375}
    assert "PQ" not in runs_table([run(boxes)])
    head, _, *lines = runs_table([run(boxes), run(segments)]).splitlines()
    assert head.split()[5] == "AP50"
    assert [line.split()[4:7] for line in lines] == [["0.500", "0.750", "-"], ["0.250", "0.500", "0.375"]]
