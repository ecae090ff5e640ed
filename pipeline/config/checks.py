"""The check that sections make of their fields."""

from __future__ import annotations

import math

from pipeline.errors import RunConfigError


def require(holds: bool, name: str, got: object, expected: str) -> None:
    """Raise `RunConfigError` unless `holds` is true and `got` is finite."""
    # Infinity would pass a lower bound, but JSON cannot represent it.
    if not holds or got == math.inf:
        raise RunConfigError(f"{name} is {got!r}; expected {expected}")
