"""Names under which MLflow finds the pictures of a run.

MLflow's slider opens at step 0 and would show nothing there. So each series has its newest picture at step 0, under a name
that does not change: the page of the run shows it, and the description links to it.
"""

from __future__ import annotations

from pipeline.tracking.tracker import SUMMARY

DETECTIONS = f"{SUMMARY}/detections"
"""Series of contact sheets: detections beside the truth."""
CURVES = f"{SUMMARY}/precision_recall"
"""Series of curves of precision over recall."""
REPORT = "report.html"
"""Artifact of a run: the report of its newest evaluation."""


def newest(key: str) -> str:
    """Return the artifact with the newest picture of a series, as MLflow names pictures of step 0."""
    return f"{_stem(key)}.png"


def newest_small(key: str) -> str:
    """Return the artifact with the newest picture of a series in a size for pages."""
    return f"{_stem(key)}+compressed.webp"


def _stem(key: str) -> str:
    return f"images/{key.replace('/', '~')}+step+0+timestamp+0+newest"
