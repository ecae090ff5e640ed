"""The Ray that a driver starts on its own machine, out of reach of the signals that are meant for the driver."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class LocalRay:
    """Ray's servers on this machine, children of this process; none of them where a running cluster is joined."""

    def __init__(self) -> None:
        self._servers: list[subprocess.Popen[bytes]] = []

    @contextmanager
    def outside_the_group(self) -> Iterator[None]:
        """What Ray starts inside the block leads process groups of its own.

        Ctrl-C in a terminal, `timeout`, and schedulers signal the driver's whole group, and Ray's servers would end
        before the workers have saved. Ray has no setting for it, so the class it starts them with is exchanged for the
        time being. They still end with the driver, whatever kills it: the kernel sees to that (PR_SET_PDEATHSIG). They
        also end where the block fails, which Ray leaves to the end of this process.
        """
        from ray._private import services

        started = self._servers

        class Leader(services.ConsolePopen):  # type: ignore[misc]
            def __init__(self, *args: Any, **more: Any) -> None:
                super().__init__(*args, **more, process_group=0)
                started.append(self)

        before, services.ConsolePopen = services.ConsolePopen, Leader
        try:
            yield
        except BaseException:
            for server in started:
                server.kill()
                server.wait()
            raise
        finally:
            services.ConsolePopen = before

    def gone(self) -> bool:
        """Whether one of the servers has ended, and the workers with it."""
        return any(server.poll() is not None for server in self._servers)
