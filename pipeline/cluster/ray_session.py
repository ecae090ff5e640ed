"""Connection to Ray: start it on this machine, out of reach of the driver's signals, or join a running cluster."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.cluster.worker_start import import_all
from pipeline.config import RunConfig
from pipeline.errors import PipelineError, Postponed, TrainingError
from shards.errors import one_line

_CLOSE_S = 3.0
_LOOK_S = 0.2
_HEAD_AGAIN_S, _HEAD_ANSWER_S = 2.0, 5.0
_STARTS = 3  # of Ray on this machine
WORKER = {"DETR_PROCESS": "worker"}
"""Environment of a process that trains. Ray Train has half a dozen others, which import nothing of ours."""
BARE = {"DETR_PROCESS": "bare"}
"""Environment of a process that does not prepare itself."""


class SlowStart(Postponed):
    """Raised when Ray's servers have not started within the 30 s that Ray gives them, as on a busy machine."""


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
        from pipeline.cluster.ray_internals import servers_in_own_groups

        self._servers.clear()  # those of a failed start
        try:
            with servers_in_own_groups(self._servers):
                yield
        except BaseException:
            self.kill()
            raise

    @property
    def started(self) -> bool:
        """True if Ray was started here, for this run alone."""
        return bool(self._servers)

    def kill(self) -> None:
        """End the servers at once."""
        for server in self._servers:
            server.kill()
            server.wait()

    def gone(self) -> bool:
        """Return True if one of the servers has ended, and the workers with it."""
        return any(server.poll() is not None for server in self._servers)


class Connection:
    """Connection of this process to Ray, made by a thread of its own.

    The thread lives as long as the connection does, since Ray's servers end with the thread that has started them.
    """

    def __init__(self, config: RunConfig, address: str | None, verbose: bool) -> None:
        """Begin to join the cluster at `address`, or to start Ray on this machine."""
        self.address, self.local = address, LocalRay()
        self._config, self._verbose = config, verbose
        self._error: BaseException | None = None
        self._waits: list[str] = []
        self._made, self._over = threading.Event(), threading.Event()
        # Two threads that import at a time can see each other's modules half done, so all of Ray is imported here.
        import_all(["pipeline.cluster.ray_internals"])
        import pipeline.cluster.ray_internals  # noqa: F401  # a Ray that lacks what this needs is an error at once

        threading.Thread(target=self._hold, name="ray", daemon=True).start()

    def _hold(self) -> None:
        try:
            if self.address:
                wait_for_head(self.address, self._config.cluster.wait_s, self._waits.append, self._over)
            if self.address:
                with self.local.outside_the_group():
                    join_cluster(self.address, self._verbose, setup_hook())
            else:
                self._start()
                cluster = self._config.cluster
                start_workers_early({"CPU": cluster.cpus_per_worker}, cluster.workers)
        except BaseException as error:
            self._error = error
        self._made.set()
        self._over.wait()

    def _start(self) -> None:
        """Start Ray on this machine, anew if it was too busy for that."""
        for left in reversed(range(_STARTS)):
            try:
                with self.local.outside_the_group():
                    return start_local_ray(self._config, self._verbose, setup_hook())
            except SlowStart:
                if not left or self._over.is_set():
                    raise

    def wait(self, say: Callable[[str], None] = lambda _: None) -> None:
        """Wait until the connection is made; `say` gets a line if its cluster does not answer yet.

        Raise the error of `wait_for_head`, `join_cluster` or `start_local_ray`.
        """
        while not self._made.wait(_LOOK_S):
            while self._waits:
                say(self._waits.pop())
        if self._error:
            raise self._error

    def close(self) -> None:
        """End the connection, and the Ray that was started for it. May be called again."""
        import ray

        if self._made.wait(_CLOSE_S):
            ray.shutdown()
        else:  # it was interrupted while Ray starts, and must not wait for that
            self.local.kill()
        self._over.set()


def start_workers_early(each: Mapping[str, float], workers: int) -> None:
    """Let the nodes start the processes of so many workers, which need `each`, and Ray Train's controller here.

    They import what training needs while the driver prepares the run. On which nodes Ray will place the workers is a
    guess: it fills one node after the other.
    """
    import ray

    from pipeline.cluster.ray_internals import start_processes

    here = ray.get_runtime_context().get_node_id()
    for node in sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeID"] != here):
        if node["NodeID"] == here:
            start_processes(node, 1, {})
        fit = min(int(node["Resources"].get(kind, 0) // count) for kind, count in each.items())
        taken = min(workers, fit)
        workers -= taken
        start_processes(node, taken, WORKER)


def setup_hook() -> Callable[[], None]:
    """Return the function that Ray calls in each new process of a run (`worker_process_setup_hook`).

    A function inside a function is sent as code. So it can run on a node without this package too, where a process that
    does not start could not report that.
    """

    def prepare() -> None:
        import os
        from contextlib import suppress

        kind = os.environ.get("DETR_PROCESS", "")
        if kind == "bare":
            return
        with suppress(Exception):  # what fails here fails again where it is needed, and is reported there
            from pipeline.cluster.worker_start import prepare_controller, prepare_worker

            prepare_worker() if kind == "worker" else prepare_controller()

    return prepare


def wait_for_head(address: str, wait_s: float, waits: Callable[[str], None], over: threading.Event) -> None:
    """Wait until the head of a cluster answers, or until `over`; call `waits` once with a line about it.

    Raise `Postponed` after `wait_s`, and `PipelineError` at once for a host that does not exist.
    """
    try:
        parsed = urlsplit(address if "://" in address else f"//{address}")
        host, port = parsed.hostname, parsed.port
    except ValueError:
        return  # Ray refuses it
    until, said = time.monotonic() + wait_s, False
    while host and port and not over.is_set() and (reason := _refusal(address, host, port)):
        left = until - time.monotonic()
        if left <= 0:
            raise Postponed(
                f"no Ray cluster answers at {address} ({reason}); expected one within {wait_s:g} s (--cluster.wait-s): "
                "start it, or check --address"
            )
        if not said:
            waits(f"waiting for the Ray cluster at {address}, {wait_s:g} s at most: {reason}")
        said = True
        over.wait(min(_HEAD_AGAIN_S, left))


def _refusal(address: str, host: str, port: int) -> str:
    """Return the reason why nothing answers at a port, or ""; raise `PipelineError` for an unknown host."""
    try:
        socket.create_connection((host, port), _HEAD_ANSWER_S).close()
    except socket.gaierror as error:
        if error.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)):
            raise PipelineError(
                f"no Ray cluster answers at {address} ({error.strerror}); expected a known host: check --address"
            ) from None
        return str(error.strerror)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def join_cluster(address: str, verbose: bool, setup: Callable[[], None] | None = None) -> None:
    """Connect to the Ray cluster at `address`; each new process for this driver calls `setup`.

    Raise `PipelineError` when none answers.
    """
    try:
        _init(verbose, setup, address=address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise PipelineError(
            f"no Ray cluster answers at {address} ({one_line(error)}); expected a running one: check --address"
        ) from None


def start_local_ray(config: RunConfig, verbose: bool, setup: Callable[[], None] | None = None) -> None:
    """Start Ray on this machine for the workers of a run; each new process calls `setup`.

    Raise `TrainingError` if it does not start, and `SlowStart` if that may pass.
    """
    # A laptop with fewer cores than workers still runs them, more slowly.
    needed = (config.cluster.workers + config.evaluate.asynchronous) * config.cluster.cpus_per_worker
    # The workers and the controller start together. Ray would start as many processes at a time as there are cores.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(config.cluster.workers + 1))
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # in another environment, so nothing would use them
    from pipeline.cluster.ray_internals import fewest_servers

    try:
        with fewest_servers(output=verbose):
            _init(
                verbose,
                setup,
                address="local",
                num_cpus=max(os.cpu_count() or 1, needed),
                include_dashboard=False,
                _node_ip_address="127.0.0.1",  # a laptop keeps it when it changes networks
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise TrainingError(
            f"Ray does not start on this machine ({one_line(error)}); expected its servers to: --verbose shows their "
            "output, --address joins a running cluster"
        ) from None
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        raise SlowStart(
            "Ray does not start on this machine within 30 s; expected a less busy one: try again later, or join a "
            "running cluster with --address"
        ) from None


def _init(verbose: bool, setup: Callable[[], None] | None, **options: Any) -> None:
    """Call `ray.init`, without Ray's own log unless `verbose`."""
    import ray

    quiet = {} if verbose else {"log_to_driver": False, "logging_level": "ERROR"}
    if setup:
        options["runtime_env"] = {"worker_process_setup_hook": setup}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(**options, **quiet)


def authenticate() -> None:
    """Make Ray send this machine's token to the cluster that it joins; call this before ray is imported.

    `ray start --head` requires a token by default and writes one, yet clients send it only in mode `token`. A chosen
    mode (`RAY_AUTH_MODE`) is respected; a cluster without authentication ignores the token.
    """
    known = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if known or (Path.home() / ".ray" / "auth_token").exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def lock_local_ray() -> None:
    """Protect the Ray that is started here with a token: its ports are open to the network and accept code to run.

    Ray turns authentication on for servers that it starts, unless `RAY_AUTH_MODE` is set. It is not set here, since it
    would apply to the servers but not to this process if ray was imported before. Without a token of this run, Ray
    would write one to the home folder.
    """
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
