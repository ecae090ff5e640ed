"""The known name that a mistyped one is most similar to."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name that is most similar to this one."""
    return max(known, key=lambda other: difflib.SequenceMatcher(None, name, other).ratio())
