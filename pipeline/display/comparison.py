"""Tables and a picture of the difference between two sides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from pipeline.display.draw import COLOURS, figure_picture
from pipeline.display.terminal import table
from shards.score.difference import LEAST_IMAGES, Change, Difference, interval_of_recipes, spread

_CLASSES = 20  # in a table; more have their largest changes shown
_CLASSES_DRAWN = 30
_CHANCE = 20  # one in so many intervals of 95% misses the truth
_RARE = "few images"
_COLOURS = {"better": COLOURS[4], "worse": COLOURS[5], "within chance": "#999999", _RARE: "#CCCCCC"}
_HEADER = ("before", "after", "change", "95% interval", "verdict")


def verdict(change: Change) -> str:
    """Return whether the second side is better, worse, or within chance of the first, as far as there are images."""
    if change.is_rare:
        return _RARE
    if change.is_chance:
        return "within chance"
    return "better" if change.low > 0 else "worse"


def interval_text(change: Change) -> str:
    """Return a change with its interval, in a few words."""
    return f"{change.name} {change.difference:+.4f}, 95% interval {change.low:+.4f} to {change.high:+.4f}"


def difference_tables(found: Difference) -> str:
    """Return tables of the figures and of the classes, and lines about runs where a side has several."""
    figures = table(("figure", *_HEADER), [(change.name, *_cells(change)) for change in found.figures])
    shown, left_out = _largest(found.classes, _CLASSES)
    classes = table(
        ("class", "objects", *_HEADER), [(change.name, f"{change.objects:,}", *_cells(change)) for change in shown]
    )
    rest, count = [], len(shown) + left_out
    if left_out:
        rest.append(f"... and {left_out} classes that change less")
    if any(change.is_rare for change in shown):
        rest.append(f"few images: a class in fewer than {LEAST_IMAGES} images, whose interval says nothing")
    if count >= _CHANCE:
        rest.append(f"by chance alone about {count // _CHANCE} of {count} classes look better or worse")
    return "\n\n".join(text for text in (figures, _runs(found), classes, "\n".join(rest)) if text)


def _cells(change: Change) -> tuple[str, ...]:
    if change.before < 0:
        return ("-",) * len(_HEADER)
    figures = (f"{change.before:.4f}", f"{change.after:.4f}", f"{change.difference:+.4f}")
    return (*figures, f"{change.low:+.4f} to {change.high:+.4f}", verdict(change))


def _largest(classes: Sequence[Change], count: int) -> tuple[list[Change], int]:
    """Return the classes with the largest changes, from the worst to the best, and the number of the others."""
    known = [change for change in classes if change.before >= 0]
    largest = sorted(known, key=lambda change: -abs(change.difference))[:count]
    return sorted(largest, key=lambda change: change.difference), len(known) - len(largest)


def _runs(found: Difference) -> str:
    name = found.deciding.name
    sides = {"before": found.before_runs, "after": found.after_runs}
    if max(map(len, sides.values())) < 2:
        return ""
    lines = [
        f"{side.ljust(6)}  {name} of {len(runs)} run{'s' * (len(runs) > 1)}: {', '.join(f'{value:.4f}' for value in runs)}; "
        f"mean {sum(runs) / len(runs):.4f}" + (f", deviation {spread(runs):.4f}" if len(runs) > 1 else "")
        for side, runs in sides.items()
    ]
    interval = interval_of_recipes(found.before_runs, found.after_runs)
    if interval is not None:
        low, high = interval
        lines.append(f"other runs of both, on these images: {name} changes by {low:+.4f} to {high:+.4f} (95%, Welch)")
    lines.append("the intervals in the tables are of these runs, on other images")
    return "\n".join(lines)


def difference_picture(found: Difference, title: str) -> Image.Image:
    """Return a picture of the changes with their intervals: figures on the left, classes on the right."""
    from matplotlib.figure import Figure

    figures = [change for change in found.figures if change.before >= 0]
    classes, left_out = _largest(found.classes, _CLASSES_DRAWN)
    rows = max(len(figures), len(classes), 1)
    figure = Figure(figsize=(13, 1.9 + 0.26 * rows), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
    _draw(left, figures[::-1], rows, f"{found.images:,} images")
    name = found.deciding.name
    of_all = f"{name} by class, the {len(classes)} largest changes of {len(classes) + left_out}"
    _draw(right, classes, rows, of_all if left_out else f"{name} by class")
    figure.suptitle(f"{title}\nblue better, orange worse, grey within chance", fontsize=11)
    return figure_picture(figure)


def _draw(axes: Any, changes: Sequence[Change], rows: int, name: str) -> None:
    """Draw one line for each change, the last on top, with space for so many rows."""
    axes.axvline(0, color="black", linewidth=0.8)
    for row, change in enumerate(changes):
        colour = _COLOURS[verdict(change)]
        axes.plot((change.low, change.high), (row, row), color=colour, linewidth=2.5, solid_capstyle="butt")
        axes.plot(change.difference, row, "o", color=colour, markersize=5)
    axes.set_yticks(
        range(len(changes)), [f"{change.name}  {change.before:.3f} → {change.after:.3f}" for change in changes]
    )
    axes.set_ylim(len(changes) - rows - 0.7, len(changes) - 0.3)
    axes.locator_params(axis="x", nbins=6)
    axes.grid(axis="x", color="#DDDDDD")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_title(name, fontsize=10, loc="left")
    axes.set_xlabel("change, with its 95% interval")
