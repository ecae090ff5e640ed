"""Tables that people read in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pipeline.standing import Progress, clock_time, read_progress
from pipeline.track import TAG_PHASE

if TYPE_CHECKING:
    from mlflow.entities import Run

    from pipeline.layers import LayerScore

_MEANINGS = {
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


def metrics_table(metrics: Mapping[str, float]) -> str:
    """The twelve COCO numbers, of masks as well where there are; `-` where the data set has no such truth."""
    masks = "mask_AP" in metrics

    def shown(name: str) -> str:
        return "-" if metrics[name] < 0 else f"{metrics[name]:.3f}"

    rows = [
        (name, shown(name), *((shown(f"mask_{name}"),) if masks else ()), meaning)
        for name, meaning in _MEANINGS.items()
    ]
    return table(("metric", "boxes", "masks", "of") if masks else ("metric", "value", "of"), rows)


def layers_table(scores: Sequence[LayerScore]) -> str:
    """AP and AP50 of each decoder layer without and with suppression of duplicates, then of all of them merged."""
    cells: dict[int | None, dict[bool, tuple[str, str]]] = {}
    for score in scores:
        values = tuple("-" if score.metrics[name] < 0 else f"{score.metrics[name]:.3f}" for name in ("AP", "AP50"))
        cells.setdefault(score.layer, {})[score.nms is not None] = (values[0], values[1])
    threshold = next(score.nms for score in scores if score.nms is not None)
    header = ("decoder layer", "AP", "AP50", f"AP, NMS {threshold:g}", f"AP50, NMS {threshold:g}")
    absent = ("-", "-")
    return table(
        header,
        [
            ("all merged" if layer is None else str(layer), *both.get(False, absent), *both.get(True, absent))
            for layer, both in cells.items()
        ],
    )


def runs_table(runs: Sequence[Run]) -> str:
    """Runs, newest first: what they are, how far they are, how good."""
    rows = []
    for run in runs:
        metrics = run.data.metrics
        phase = run.data.tags.get(TAG_PHASE, "")
        running, progress = run.info.status == "RUNNING", read_progress(run.data.tags)
        status = phase if running else str(run.info.status).lower()
        started = datetime.fromtimestamp(run.info.start_time / 1000).strftime("%Y-%m-%d %H:%M")
        rows.append(
            (
                run.info.run_id[:8],
                str(run.info.run_name),
                status,
                f"{metrics['epoch']:g}" if "epoch" in metrics else "-",
                f"{metrics['val/AP']:.3f}" if "val/AP" in metrics else "-",
                f"{metrics['val/AP50']:.3f}" if "val/AP50" in metrics else "-",
                started,
                _end(progress) if running else "-",
            )
        )
    return table(("run", "name", "status", "epoch", "AP", "AP50", "started", "ends"), rows)


def _end(progress: Progress | None) -> str:
    """When a run will end; one whose end has passed has a driver no more, or no forecast that is worth telling."""
    end = progress.ends if progress else None
    return clock_time(end) if end and end > datetime.now(UTC) else "-"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns under a ruled header."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])
