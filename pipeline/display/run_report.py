"""The report of a run: the page of its newest evaluation, with the curves of all and the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from PIL import Image

from pipeline.checkpoint.history import Evaluated
from pipeline.config import RunConfig, to_json
from pipeline.display.draw import COLOURS, Line, chart
from pipeline.display.report import html_picture, html_table
from pipeline.display.segments import gains_picture, quality_columns
from pipeline.evaluation.panoptic import PanopticScore
from pipeline.tracking.pages.parameters import differing
from shards.dataset.manifest import Manifest

_PROGRESS = (
    ("AP", "PQ_stuff", "PQ_things", "PQ"),
    ("mask_AP50", "mask_AP", "AP50", "AP"),
    ("AP75", "AP50", "AP"),
)
"""Figures of the chart of a run's progress: the first of which all were measured."""

REMEDY = (
    "Register the checkpoint and give detr evaluate MODEL --report FOLDER: it writes a correction for each, to be "
    "reviewed."
)


def progress_section(history: Sequence[Evaluated], epochs: int) -> str:
    """Return the section with AP and loss over the epochs of a run."""
    end = max(epochs, *(entry.epoch for entry in history), 1)
    xs = [entry.epoch for entry in history]
    measured: set[str] = set().union(*(entry.metrics for entry in history))
    names = next(names for names in _PROGRESS if measured.issuperset(names) or names is _PROGRESS[-1])
    colours = ("#999999", COLOURS[4], COLOURS[5], "black")[-len(names) :]
    lines = [
        Line(name.replace("_", " "), colour, [entry.metrics.get(name, -1.0) for entry in history])
        for name, colour in zip(names, colours, strict=True)
    ]
    pictures = [chart(lines, xs, "epoch", names[-1].replace("_", " "), x_end=end)]
    losses = [-1.0 if entry.loss is None else entry.loss for entry in history]
    if max(losses, default=-1.0) > 0:
        loss = Line("training loss", COLOURS[5], losses)
        pictures.append(chart([loss], xs, "epoch", "loss", x_end=end, y_end=1.05 * max(losses)))
    captions = ("Figures on the validation data at each evaluation.", "Mean training loss before it.")
    figures = [html_picture(picture, "PNG", caption) for picture, caption in zip(pictures, captions, strict=False)]
    return f"<h2>Progress</h2><div class=row>{''.join(figures)}</div>"


def segments_section(manifest: Manifest, score: PanopticScore) -> str:
    """Return the section with the panoptic quality, per class and per kind of error."""
    figures = score.metrics
    groups = {"all": "", "things": "_things", "stuff": "_stuff"}
    rows = [
        (
            group,
            *("-" if figures[name + suffix] < 0 else f"{figures[name + suffix]:.3f}" for name in ("PQ", "SQ", "RQ")),
        )
        for group, suffix in groups.items()
    ]
    columns = quality_columns(score.quality, manifest.categories)
    classes = [
        tuple(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row)
        for row in sorted(zip(*columns.values(), strict=True), key=lambda row: row[2])
    ]
    errors = html_picture(gains_picture(score.quality), "PNG", "PQ if a kind of error never happened, all others kept.")
    return (
        f"<h2>Segments</h2><div class=row>{html_table(('classes', 'PQ', 'SQ', 'RQ'), rows)}{errors}</div>"
        f"<div class=classes>{html_table(tuple(columns), classes)}</div>"
    )


def detections_section(sheet: Image.Image, panoptic: bool) -> str:
    """Return the section with a sheet of detections, or of segments, beside the truth."""
    shown = "segments of queries with scores above 0.85" if panoptic else "detections with scores from 0.5"
    caption = f"The same images at each evaluation; {shown}."
    return f"<h2>Detections</h2>{html_picture(sheet, 'WEBP', caption)}"


def configuration_section(config: RunConfig) -> str:
    """Return the section with what differs from the recipe, and the whole configuration to unfold."""
    rows = [(name, value or "-", usual or "-") for name, (value, usual) in differing(config).items()]
    recipe = config.recipe or "the defaults"
    table = html_table(("option", "this run", recipe), rows) if rows else f"<p>As {escape(recipe)}.</p>"
    whole = escape(to_json(config).decode())
    return f"<h2>Configuration</h2>{table}<details><summary>All of it</summary><pre>{whole}</pre></details>"
