"""Checks that run on a node of the cluster, where this package may be missing.

`probe.py` sends the code of this module along with them. So it imports nothing but the standard library when it is
loaded, and what else it needs where it needs it.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import socket
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGES = ("shards", "detr", "pipeline", "jobs")
AWAY = "which does not answer now"
"""Words in a problem that may pass."""
_ANSWER_S = 5.0


@dataclass(frozen=True)
class Question:
    """Facts that the driver asks each node for."""

    code: str
    """Digest of the driver's code. A node with other code, whose modules may differ, is asked for nothing more."""
    storages: tuple[str, ...]
    """Folders and URLs in each of which the driver has written a file with the name and content `token`."""
    token: str
    data: tuple[str, ...]
    """Files whose content is compared."""
    tracking_uri: str
    gpus: int
    """Number of GPUs that Ray counts on the node, 0 if none is to be used."""


def code_digest() -> str:
    """Return a digest of the sources of this project as they are installed here, or "" without them."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:  # an empty folder with that name is found too, without a file
            return ""
        root = Path(spec.origin).parent
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{package}/{path.relative_to(root).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Return the versions that must be the same on all nodes; "" for what is not installed."""
    found = {"Python": ".".join(platform.python_version_tuple()[:2])}
    for library in ("ray", "torch", "mlflow", "detr-cluster"):
        try:
            # Builds for CPUs and for several CUDA releases (torch 2.15.0+cu130) exchange what they have to.
            found[library] = importlib.metadata.version(library).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found[library] = ""
    return found


def file_digests(urls: tuple[str, ...]) -> dict[str, str]:
    """Return a digest of each file's content, or the reason why it cannot be read."""
    from shards.errors import ShardError, one_line
    from shards.store import storage
    from shards.store.retry import fewer_retries, may_pass

    found = {}
    for url in urls:
        try:
            with fewer_retries():
                found[url] = hashlib.sha256(storage.read(url)).hexdigest()
        except (OSError, ShardError) as error:
            found[url] = f"cannot be read{', ' + AWAY if may_pass(error) else ''}: {one_line(error)}"
    return found


def tracking_problem(uri: str) -> str:
    """Return the reason why the MLflow server cannot be reached from here, or ""."""
    scheme, _, rest = uri.partition("://")
    if scheme not in ("http", "https"):
        return ""
    address = f"{scheme}://{rest.rpartition('@')[2].rstrip('/')}/health"
    try:
        urllib.request.urlopen(address, timeout=_ANSWER_S).close()
    except urllib.error.HTTPError:
        return ""  # it answers, if only to refuse
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if "CERTIFICATE" in str(reason):
            return ""  # MLflow has settings of its own for certificates
        # A refused connection is more often a wrong address than a server that restarts.
        return f"{AWAY}: {reason}" if isinstance(reason, TimeoutError) else str(reason)
    return ""


def login_problem(uri: str) -> str:
    """Return the reason why the MLflow server does not let this node in, or ""; it answers `/health` without a login."""
    scheme, _, rest = uri.partition("://")
    if scheme not in ("http", "https"):
        return ""
    request = urllib.request.Request(f"{scheme}://{rest.rstrip('/')}/api/2.0/mlflow/experiments/search?max_results=1")
    user, password = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD")
    if user and password:
        request.add_header("Authorization", f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}")
    elif token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    try:
        urllib.request.urlopen(request, timeout=_ANSWER_S).close()
    except urllib.error.HTTPError as error:
        return _mlflow_refusal(uri) if error.code == 401 else ""
    except (OSError, ValueError):
        return ""  # `tracking_problem` judges that
    return ""


def _mlflow_refusal(uri: str) -> str:
    """Return the reason why MLflow's own client is refused, which knows other ways to log in, or ""."""
    from pipeline.errors import TrackingAway, TrackingError
    from pipeline.tracking.mlflow_client import connect

    try:
        connect(uri)
    except TrackingAway:
        return ""
    except TrackingError:
        return "the login of this node is refused (401)"
    return ""


class NodeCheck:
    """The process on a node that answers."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._store: Any = None

    def report(self, question: Question) -> dict[str, Any]:
        """Return the facts of this node."""
        facts: dict[str, Any] = {
            "host": socket.gethostname(),
            "versions": versions(),
            "digest": code_digest(),
            "tracking": tracking_problem(question.tracking_uri),
        }
        if facts["digest"] != question.code:
            return facts
        from pipeline.cluster.interfaces import chosen_interface
        from pipeline.run_folder import scratch_problem

        facts["interface"] = chosen_interface(self._address)
        facts["storages"] = {url: self._exchange(url, question.token) for url in question.storages}
        facts["scratch"] = scratch_problem(question.token)
        facts["login"] = login_problem(question.tracking_uri)
        facts["data"] = file_digests(question.data)
        if question.gpus:
            facts["gpus"] = self._visible_gpus()
        return facts

    def _exchange(self, url: str, token: str) -> str:
        """Read what the driver wrote and write an answer; return the reason if that fails, or ""."""
        from shards.errors import ShardError, one_line
        from shards.store import storage
        from shards.store.retry import fewer_retries, may_pass

        try:
            with fewer_retries():
                if storage.read(storage.join(url, token)) != token.encode():
                    return "holds another file than the driver wrote"
                storage.write(storage.join(url, f"{token}-{self._address}"), self._address.encode())
        except FileNotFoundError:
            return "does not show what the driver wrote there"
        except (OSError, ShardError) as error:
            return f"cannot be used{', ' + AWAY if may_pass(error) else ''}: {one_line(error)}"
        return ""

    def _visible_gpus(self) -> int:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray hides the GPUs from a process that reserves none
        import torch

        return int(torch.cuda.device_count())

    def prepare(self) -> None:
        """Import what an all-reduce needs, on all nodes at a time, while the driver reads the reports."""
        with suppress(Exception):  # a node without the package is reported
            importlib.import_module("pipeline.distributed.meeting")

    def listen(self, size: int) -> int:
        """Open the meeting point of an all-reduce over `size` nodes; return its port."""
        from pipeline.distributed.meeting import open_meeting

        self._store = open_meeting(self._address, size)
        return int(self._store.port)

    def all_reduce(self, host: str, port: int, rank: int, size: int, seconds: float) -> str:
        """Sum a one of each node over the interface that workers use; return the reason if that fails, or ""."""
        from pipeline.cluster.interfaces import choose_interface
        from pipeline.distributed.meeting import all_reduce_ones, join_meeting

        choose_interface(self._address)
        try:
            store = self._store or join_meeting(host, port, size, seconds)
            total = all_reduce_ones(store, rank, size, seconds)
        except (RuntimeError, ValueError) as error:
            return str(error).strip().splitlines()[0]
        return "" if int(total) == size else f"the sum over {size} nodes was {total:g}"
