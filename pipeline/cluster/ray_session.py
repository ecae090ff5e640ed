"""Connection to Ray: start it on this machine, out of reach of the driver's signals, or join a running cluster."""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.errors import PipelineError
from shards.errors import one_line


class LocalRay:
    """Ray's servers on this machine, children of this process. There are none when a running cluster is joined."""

    def __init__(self) -> None:
        self._servers: list[subprocess.Popen[bytes]] = []

    @contextmanager
    def outside_the_group(self) -> Iterator[None]:
        """Start Ray's servers inside the block in process groups of their own; kill them if the block fails.

        Ctrl-C in a terminal, `timeout` and schedulers signal the driver's whole process group, which would end Ray's
        servers before the workers have saved. The servers still end with the driver, whatever kills it, because they
        set PR_SET_PDEATHSIG. Ray itself would keep the servers of a failed start until this process ends.
        """
        from pipeline.ray_internals import servers_in_own_groups

        try:
            with servers_in_own_groups(self._servers):
                yield
        except BaseException:
            for server in self._servers:
                server.kill()
                server.wait()
            raise

    def gone(self) -> bool:
        """Return True if one of the servers has ended, and the workers with it."""
        return any(server.poll() is not None for server in self._servers)


def join_cluster(address: str, verbose: bool) -> None:
    """Connect to the Ray cluster at `address`; raise `PipelineError` when none answers."""
    import ray

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(address=address, **quiet_options(verbose))
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise PipelineError(
            f"no Ray cluster answers at {address} ({one_line(error)}); expected a running one: check --address"
        ) from None


def quiet_options(verbose: bool) -> dict[str, Any]:
    """Return the options of `ray.init` that turn Ray's own log off, unless `verbose`."""
    return {} if verbose else {"log_to_driver": False, "logging_level": "ERROR"}
