"""Precision-recall curves of an evaluation, as a picture and as a table."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from PIL import Image

from pipeline.figures import COLOURS, Line, chart, side_by_side
from shards.curves import RECALLS, Curves


def curves_picture(boxes: Curves, masks: Curves | None = None) -> Image.Image:
    """Return a chart of the curves at IoU 0.50, 0.75 and 0.50:0.95 with their means; those of masks on the right."""
    if masks is None:
        return _chart(boxes)
    return side_by_side(_chart(boxes), _chart(masks), ("boxes", "masks"))


def _chart(curves: Curves) -> Image.Image:
    lines = [
        Line(f"{name} {fmean(ys):.3f}" if ys[0] >= 0 else f"{name} -", colour, ys)
        for name, colour, ys in (
            ("AP50", COLOURS[4], curves.precision50),
            ("AP75", COLOURS[5], curves.precision75),
            ("AP (IoU 0.50:0.95)", "black", curves.precision),
        )
    ]
    return chart(lines, RECALLS, "recall", "precision")


def curves_table(boxes: Curves, masks: Curves | None = None) -> dict[str, list[Any]]:
    """Return columns by name: recall, and precision at IoU 0.50:0.95, 0.50 and 0.75; masks with prefix `mask_`."""
    columns: dict[str, list[Any]] = {"recall": list(RECALLS)}
    for prefix, curves in (("", boxes), ("mask_", masks)):
        if curves:
            columns |= {prefix + name: list(ys) for name, ys in vars(curves).items()}
    return columns
