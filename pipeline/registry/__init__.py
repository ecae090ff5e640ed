"""Registered versions: weights, card and code in MLflow; registered, found again, described.

May import `pipeline.training` and what lies below it. Loads its public functions when they are first used, since a
served version imports `pipeline.registry.card` where neither Ray nor MLflow's client is installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.registry.registration import register, register_run
    from pipeline.registry.versions import resolve

__all__ = ["register", "register_run", "resolve"]

_HOME = {"register": "registration", "register_run": "registration", "resolve": "versions"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
