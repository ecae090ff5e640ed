"""A stand-in for the workers of a run, in the test's process and without Ray."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest

from pipeline.driver import work


def stand_in(patch: pytest.MonkeyPatch, run_workers: Callable[..., None]) -> None:
    """Let `run_workers(config, run_id, folder, accept_change=...)` stand for the workers on a cluster."""

    @contextmanager
    def connected(*_: object, **__: object) -> Iterator[Any]:
        class Cluster:
            run = staticmethod(run_workers)

        yield Cluster

    patch.setattr(work, "connecting", lambda *_, **__: nullcontext())
    patch.setattr(work, "connected", connected)
