from pipeline.report import metrics_table
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
