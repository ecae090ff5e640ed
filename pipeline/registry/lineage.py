"""Facts about a version as text: what it is and how it is used, and what it was made of down to the annotations."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from itertools import zip_longest

from pipeline.display.terminal import table
from pipeline.figures import deciding_name, deciding_text
from pipeline.registry.description import corrections_text, usage_text
from pipeline.registry.facts import Figures, VersionFacts
from pipeline.tracking.pages.data import DataSet
from pipeline.tracking.pages.links import run_link
from pipeline.tracking.pages.parameters import differing

_PANOPTIC = ("PQ", "PQ_things", "PQ_stuff")
_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
_WIDTH = 116
_Rows = Iterator[tuple[str, str]]


def version_text(facts: VersionFacts) -> str:
    """Return a version as text: its figures on each data set, its run, data and code, and the commands that use it."""
    return "\n\n".join([_title(facts), _figures_table(facts), _lines(_version_rows(facts)), usage_text(facts)])


def lineage_text(facts: VersionFacts) -> str:
    """Return what a version was made of, then the same of the version that it started from, down to the first."""
    chain = [facts]
    while chain[-1].parent:
        chain.append(chain[-1].parent)
    blocks = [f"{_title(entry)}\n{_lines(_lineage_rows(entry))}" for entry in chain]
    return "\n\n".join(blocks)


def _title(facts: VersionFacts) -> str:
    aliases = "".join(f" @{alias}" for alias in facts.aliases)
    figures = facts.figures[0] if facts.figures else None
    known = figures is not None and deciding_name(figures.metrics) in figures.metrics
    score = f": {deciding_text(figures.metrics)} on {_data_name(figures)}" if figures and known else ""
    return f"{facts.uri}{aliases}{score}"


def _data_name(figures: Figures) -> str:
    return figures.data or f"data {figures.digest[:12]}"


def _column(facts: VersionFacts, figures: Figures, prefix: str) -> str:
    by = "" if figures.run_id == facts.run_id else " evaluated"
    return _data_name(figures) + by + (" masks" if prefix else "")


def _figures_table(facts: VersionFacts) -> str:
    if not facts.figures:
        return "not evaluated yet: `detr evaluate` adds its figures"
    masks = any("mask_AP" in figures.metrics for figures in facts.figures)
    columns = [(figures, prefix) for figures in facts.figures for prefix in ("", "mask_")[: 1 + masks]]
    header = ["metric", *(_column(facts, figures, prefix) for figures, prefix in columns)]
    rows = [[name, *(_figure(figures.metrics.get(prefix + name)) for figures, prefix in columns)] for name in _NAMES]
    panoptic = [name for name in _PANOPTIC if any(name in figures.metrics for figures in facts.figures)]
    rows = [
        [name, *("" if prefix else _figure(figures.metrics.get(name)) for figures, prefix in columns)]
        for name in panoptic
    ] + rows
    return table(header, rows)


def _figure(value: float | None) -> str:
    return "-" if value is None or value < 0 else f"{value:.3f}"


def _version_rows(facts: VersionFacts) -> _Rows:
    yield from _origin_rows(facts)
    for name, text in sorted(facts.tags.items()):
        if name.startswith("change."):
            yield f"against @{name.removeprefix('change.')}", text
    for use, data in facts.data:
        yield f"{use} data", f"{data}, digest {data.digest[:12]}, {data.url}"
    if facts.config:
        changed = ", ".join(f"{name} {value or 'none'}" for name, (value, _) in differing(facts.config).items())
        yield "recipe", f"{facts.config.recipe or 'none'}, {facts.config.model.backbone}"
        yield "changed options", changed or "none"
    yield "checkpoint", facts.tags.get("checkpoint_uri", "")
    yield "moving average", facts.tags.get("ema", "")


def _origin_rows(facts: VersionFacts) -> _Rows:
    if "imported_from" in facts.tags:
        yield "imported from", facts.tags["imported_from"]
    else:
        step, epoch = int(facts.tags.get("step", 0)), float(facts.tags.get("epoch", 0))
        yield "checkpoint of", f"step {step:,}, epoch {epoch:.3g}"
    yield "run", f"{facts.run_name} ({facts.run_id[:8]}) {run_link(facts.experiment_id, facts.run_id)}"
    yield "code", f"commit {facts.commit}" + (f" of {facts.repository}" if facts.repository else "")
    if facts.parent:
        yield "started from", facts.parent.uri
    elif facts.lost_parent:
        yield "started from", f"{facts.lost_parent}, which the registry no longer has"
    else:
        yield "first weights", facts.initial_weights


def _lineage_rows(facts: VersionFacts) -> _Rows:
    yield from _origin_rows(facts)
    for use, data in facts.data:
        yield f"{use} data", str(data)
        yield from _data_rows(data)
    if not facts.data:
        yield "training data", facts.tags.get("train_digest", "")
        yield "validation data", facts.tags.get("val_digest", "")


def _data_rows(data: DataSet) -> _Rows:
    yield "  address", data.url
    yield "  digest", data.digest
    yield "  annotations", data.source_digest and f"sha256 {data.source_digest}"
    if data.corrections_digest:
        yield "  corrections", f"sha256 {data.corrections_digest}; {corrections_text(data)}"
    ordered = sorted(data.by_class, key=lambda entry: -entry.objects)
    yield "  classes", ", ".join(f"{entry.name} {entry.objects:,} in {entry.images:,} images" for entry in ordered)


def _lines(rows: _Rows) -> str:
    """Return the rows that have a text, with it in a column of its own."""
    kept = [(title, text) for title, text in rows if text]
    width = max(len(title) for title, _ in kept) + 4
    lines = []
    for title, text in kept:
        wrapped = textwrap.wrap(text, _WIDTH - width, break_long_words=False, break_on_hyphens=False)
        lines += [f"{head.ljust(width)}{line}" for head, line in zip_longest([f"  {title}"], wrapped, fillvalue="")]
    return "\n".join(lines)
