"""Private interfaces of Ray that this package uses. Nothing else imports from `ray._private` or `ray.*._internal`.

Any release of Ray may change them: `TESTED_RAY` is the release that they were checked with, and a unit test fails when
another one is installed or an interface is missing.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray._private import services
from ray.train.v2._internal.execution import context
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

__all__ = ["TESTED_RAY", "ControllerCallback", "WorkerGroupCallback", "preemption_context", "servers_in_own_groups"]

TESTED_RAY = "2.60"


def preemption_context() -> Any:
    """Return what Ray Train knows in a worker about nodes that will be taken away (`.preemption_info`, None if none).

    `ray.train.get_preemption_info()` returns the same, but waits for all workers to call it.
    """
    return context.get_train_context().preemption_context


@contextmanager
def servers_in_own_groups(started: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Start Ray's servers inside the block as leaders of their own process groups; append them to `started`.

    Ray has no setting for it, so the class that it starts them with is replaced inside the block.
    """
    original = services.ConsolePopen

    class GroupLeader(original):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options, process_group=0)
            started.append(self)

    services.ConsolePopen = GroupLeader
    try:
        yield
    finally:
        services.ConsolePopen = original
