"""Figures of an evaluation by which checkpoints and versions are compared."""

from __future__ import annotations

from collections.abc import Mapping

DECIDING = {"PQ": "PQ", "mask_AP": "mask AP", "AP": "AP"}
"""Figures that decide, and their names for people; the first that was measured decides."""
TAGGED = ("AP", "AP50", "mask_AP", "mask_AP50", "PQ")
"""Figures that a registered version has as tags."""


def deciding_name(*measured: Mapping[str, object]) -> str:
    """Return the name of the figure that compares these evaluations: the first that all of them have, or AP."""
    return next((name for name in DECIDING if all(name in figures for figures in measured)), "AP")


def deciding_text(metrics: Mapping[str, float]) -> str:
    """Return the figure that decides with its name, as `PQ 0.434`."""
    name = deciding_name(metrics)
    return f"{DECIDING[name]} {metrics[name]:.3f}"
