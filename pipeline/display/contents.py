"""Contents of training and validation data side by side: table, text and chart."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from pipeline.display.draw import COLOURS, figure_picture
from pipeline.display.terminal import table
from shards.dataset.contents import KINDS, Contents, differences

_MOST_CLASSES = 30  # of the chart
_MOST_LINES = 20  # of classes in the text
_PLACES = {  # left, bottom, width, height of each chart
    "objects": (0.07, 0.58, 0.4, 0.36),
    "sizes": (0.07, 0.08, 0.4, 0.36),
    "classes": (0.63, 0.08, 0.35, 0.86),
}
_X_NAMES = {
    "objects": "% of images",
    "sizes": "% of objects, by the root of their area in pixels",
    "classes": "% of objects",
}


def contents_columns(train: Contents, val: Contents) -> dict[str, list[Any]]:
    """Return columns by name: a row per group of each kind, numbers and shares in both data sets."""
    columns: dict[str, list[Any]] = {
        name: [] for name in ("kind", "group", "training", "validation", "training_share", "validation_share")
    }
    for kind, title in KINDS.items():
        first, second = getattr(train, kind), getattr(val, kind)
        columns["kind"] += [title] * len(first.names)
        columns["group"] += first.names
        columns["training"] += first.counts.tolist()
        columns["validation"] += second.counts.tolist()
        columns["training_share"] += first.shares.round(5).tolist()
        columns["validation_share"] += second.shares.round(5).tolist()
    return columns


def contents_text(contents: Contents, other: Contents | None = None) -> str:
    """Return a table for a terminal; with a second data set beside the first, also the distance in each kind."""
    both = [contents] if other is None else [contents, other]
    rows: list[tuple[str, ...]] = []
    for kind, title in KINDS.items():
        groups = [getattr(each, kind) for each in both]
        order = range(len(groups[0].names))
        if kind == "classes":
            order = np.argsort(-sum(each.shares for each in groups), kind="stable").tolist()
        for number, group in enumerate(list(order)[:_MOST_LINES]):
            cells = [f"{each.counts[group]:,}  {each.shares[group]:6.1%}" for each in groups]
            rows.append((title if number == 0 else "", groups[0].names[group], *cells))
        if len(groups[0].names) > _MOST_LINES:
            rows.append(("", f"and {len(groups[0].names) - _MOST_LINES} more", *([""] * len(both))))
    width = [max(len(row[column]) for row in rows) for column in range(2, 2 + len(both))]
    rows = [(*row[:2], *(cell.rjust(wide) for cell, wide in zip(row[2:], width, strict=True))) for row in rows]
    header = ("", "group", "this data set") if other is None else ("", "group", "this data set", "the other")
    text = table(header, rows)
    if other is None:
        return text
    distances = [
        (KINDS[found.kind], f"{found.distance:.1%}", f"{found.by_chance:.1%}", "differs" if found.differs else "")
        for found in differences(contents, other)
    ]
    return text + "\n\n" + table(("", "distance", "by chance", ""), distances)


def contents_picture(train: Contents, val: Contents) -> Image.Image:
    """Return a chart of the shares of each group, the most frequent classes only."""
    from matplotlib.figure import Figure  # imported here, because it takes longer than most commands

    figure = Figure(figsize=(13, 6.5), dpi=100)
    # Fixed places: matplotlib's layouts would measure every text first, which takes as long as the drawing.
    places = {kind: figure.add_axes(place) for kind, place in _PLACES.items()}
    for kind, title in KINDS.items():
        first, second = getattr(train, kind), getattr(val, kind)
        order = np.arange(len(first.names))
        if kind == "classes":
            order = np.argsort(-(first.shares + second.shares), kind="stable")[:_MOST_CLASSES]
            if len(first.names) > _MOST_CLASSES:
                title += f", the {_MOST_CLASSES} most frequent of {len(first.names)}"
        axes, heights = places[kind], np.arange(len(order), dtype=float)
        for groups, name, colour, shift in (
            (first, f"training, {train.images:,} images", COLOURS[4], -0.2),
            (second, f"validation, {val.images:,} images", COLOURS[0], 0.2),
        ):
            axes.barh(heights + shift, 100 * groups.shares[order], 0.4, color=colour, label=name)
        axes.set_yticks(heights, [first.names[group][:24] for group in order.tolist()])
        axes.invert_yaxis()
        axes.set_title(title, fontsize=11)
        axes.set_xlabel(_X_NAMES[kind])
        axes.spines[["top", "right"]].set_visible(False)
    places["objects"].legend(frameon=False)
    return figure_picture(figure)
