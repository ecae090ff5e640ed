"""Registered versions in MLflow (weights, card and code): registration and look-up.

May import `pipeline.training` and what lies below it. Public functions are imported on first use: a served version
imports `pipeline.registry.card` where the packages for training are not installed.
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
