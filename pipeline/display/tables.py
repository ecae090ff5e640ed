"""Tables of metrics, decoder layers and runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pipeline.display.terminal import clock_time, table
from pipeline.tracking.progress import RunProgress, read_progress
from pipeline.tracking.tags import TAG_PHASE

if TYPE_CHECKING:
    from mlflow.entities import Run

    from pipeline.evaluation.per_layer import LayerScore
    from shards.score.coco_eval import ClassScore


METRIC_MEANINGS = {
    "AP": "IoU 0.50:0.95",
    "AP50": "IoU 0.50",
    "AP75": "IoU 0.75",
    "APs": "small, under 32x32 px",
    "APm": "medium",
    "APl": "large, over 96x96 px",
    "AR1": "recall, 1 detection per image",
    "AR10": "recall, 10 detections",
    "AR100": "recall, 100 detections",
    "ARs": "recall, small",
    "ARm": "recall, medium",
    "ARl": "recall, large",
}


_PANOPTIC = {"PQ": "panoptic quality, SQ x RQ per class", "SQ": "IoU of matches", "RQ": "F1 of segments"}


def class_columns(classes: Sequence[ClassScore], masks: bool) -> dict[str, list[Any]]:
    """Return AP and AP50 of each class as columns by name, with those of masks if there are any."""
    columns: dict[str, list[Any]] = {
        "name": [score.name for score in classes],
        "AP": [score.ap for score in classes],
        "AP50": [score.ap50 for score in classes],
        "boxes": [score.boxes for score in classes],
        "category_id": [score.category_id for score in classes],
    }
    if masks:
        columns["mask_AP"] = [score.mask_ap for score in classes]
        columns["mask_AP50"] = [score.mask_ap50 for score in classes]
    return columns


def metrics_table(metrics: Mapping[str, float]) -> str:
    """Return a table of the twelve COCO metrics, of masks too if there are any; `-` without ground truth.

    Those of segments, if there are any, come before.
    """
    prefixes = {"boxes": "", "masks": "mask_"} if "mask_AP" in metrics else {"value": ""}
    boxes = table(
        ("metric", *prefixes, "of"),
        [
            (name, *(_score(metrics[prefix + name]) for prefix in prefixes.values()), meaning)
            for name, meaning in METRIC_MEANINGS.items()
        ],
    )
    if "PQ" not in metrics:
        return boxes
    groups = ("", "_things", "_stuff")
    rows = [(name, *(_score(metrics[name + group]) for group in groups), text) for name, text in _PANOPTIC.items()]
    return table(("metric", "all", "things", "stuff", "of"), rows) + "\n\n" + boxes


def layers_table(scores: Sequence[LayerScore]) -> str:
    """Return a table of AP and AP50 without and with NMS: of each decoder layer, then of all layers merged."""
    cells: dict[int | None, dict[bool, tuple[str, str]]] = {}
    for score in scores:
        with_nms = score.nms is not None
        cells.setdefault(score.layer, {})[with_nms] = (_score(score.metrics["AP"]), _score(score.metrics["AP50"]))
    threshold = next(score.nms for score in scores if score.nms is not None)
    header = ("decoder layer", "AP", "AP50", f"AP, NMS {threshold:g}", f"AP50, NMS {threshold:g}")
    absent = ("-", "-")
    return table(
        header,
        [
            ("all merged" if layer is None else str(layer), *of_layer.get(False, absent), *of_layer.get(True, absent))
            for layer, of_layer in cells.items()
        ],
    )


def _score(value: float) -> str:
    return "-" if value < 0 else f"{value:.3f}"


def runs_table(runs: Sequence[Run]) -> str:
    """Return a table of runs in the given order: id, name, status, progress, figures, start and predicted end.

    PQ has a column if a run has it.

    MLflow has one status for runs that were stopped and for those that were killed; the phase tells them apart.
    """
    rows = []
    panoptic = any("val/PQ" in run.data.metrics for run in runs)
    for run in runs:
        metrics = run.data.metrics
        phase = run.data.tags.get(TAG_PHASE, "")
        running, progress = run.info.status == "RUNNING", read_progress(run.data.tags)
        status = phase if running or run.info.status == "KILLED" else str(run.info.status).lower()
        started = datetime.fromtimestamp(run.info.start_time / 1000).strftime("%Y-%m-%d %H:%M")
        rows.append(
            (
                run.info.run_id[:8],
                str(run.info.run_name),
                status,
                f"{metrics['epoch']:g}" if "epoch" in metrics else "-",
                f"{metrics['val/AP']:.3f}" if "val/AP" in metrics else "-",
                f"{metrics['val/AP50']:.3f}" if "val/AP50" in metrics else "-",
                *([f"{metrics['val/PQ']:.3f}" if "val/PQ" in metrics else "-"] if panoptic else []),
                started,
                _end(progress) if running else "-",
            )
        )
    return table(
        ("run", "name", "status", "epoch", "AP", "AP50", *(["PQ"] if panoptic else []), "started", "ends"), rows
    )


def _end(progress: RunProgress | None) -> str:
    """Return the predicted end, `-` if it is unknown or has passed (the driver is dead or the forecast wrong)."""
    end = progress.ends if progress else None
    return clock_time(end) if end and end > datetime.now(UTC) else "-"
