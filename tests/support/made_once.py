"""Files that are expensive to make, made by the first process of a test session and read by all."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return the folder of this name that `make` has filled, in this process or in another one of the session."""
    session = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        session = session.parent
    with (session / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = session / f"made-{name}"
        if not folder.exists():
            aside = factory.mktemp(name)
            make(aside)
            aside.rename(folder)
        return folder
