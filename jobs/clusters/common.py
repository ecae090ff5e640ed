"""Keys that the entries of all launchers have, and their checks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from msgspec import Struct, field

from jobs.clusters.secret import Secret, is_sensitive, parse_secret
from pipeline.tracking.server.address import holds_secret

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class EntryError(ValueError):
    """Raised for a value that an entry cannot have; the message begins with the field."""


class Nodes(Struct, frozen=True, forbid_unknown_fields=True):
    """Nodes that workers run on, all alike."""

    count: int = 0
    """Number of nodes; instead of it `min` and `max` where an autoscaler adds and removes them."""
    min: int = 0
    """Minimum number of nodes with which a run may continue."""
    max: int = 0
    """Maximum number of nodes."""
    gpus: int = 0
    """GPUs of each node."""
    cpus: int = 0
    """CPUs of each node that workers may use. 0: not known."""
    memory_gib: int = 0
    """Memory of each node that workers may use, in GiB. 0: not known."""
    accelerator: str = ""
    """Type of the GPUs, as the launcher calls it: H100 for SkyPilot, a node label for Kubernetes, a gres for Slurm."""
    spot: bool = False
    """True if the nodes can be taken away at any time."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("count", "min", "max", "gpus", "cpus", "memory_gib"):
            if getattr(self, name) < 0:
                raise EntryError(f"nodes.{name} is {getattr(self, name)}; expected 0 or more")
        if self.count and (self.min or self.max):
            raise EntryError(f"nodes has count {self.count} beside min and max; expected count, or min and max")
        if not self.count and not self.max:
            raise EntryError("nodes has neither count nor max; expected a number of nodes, such as count = 2")
        if self.min > self.max and not self.count:
            raise EntryError(f"nodes.min is {self.min} and nodes.max is {self.max}; expected min <= max")

    @property
    def most(self) -> int:
        """Largest number of nodes."""
        return self.count or self.max

    @property
    def fewest(self) -> int:
        """Smallest number of nodes."""
        return self.count or self.min

    @property
    def elastic(self) -> bool:
        """True if the number of nodes may change."""
        return self.fewest < self.most


class Head(Struct, frozen=True, forbid_unknown_fields=True):
    """Node of Ray's head and of the driver. It holds no worker and should be one that stays."""

    cpus: int = 4
    memory_gib: int = 16
    instance: str = ""
    """Type of the machine, for launchers that rent machines."""


class Cluster(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Keys that the entries of all launchers have."""

    launcher: ClassVar[str] = ""
    secret_kinds: ClassVar[tuple[str, ...]] = ("env", "file")
    """Kinds of references to secrets that the launcher can follow."""
    has_not: ClassVar[tuple[str, ...]] = ()
    """Keys that mean nothing to the launcher."""

    name: str = ""
    """Name of the entry: the last word of its header `[clusters.NAME]`, never a field."""
    nodes: Nodes | None = None
    """Nodes for the workers; needed where the launcher starts them."""
    code: Literal["snapshot", "installed"] = "snapshot"
    """snapshot: the files that git tracks travel with each job. installed: nodes have this release already."""
    python: str = "python"
    """Python interpreter on the cluster."""
    directory: str = ""
    """Folder on the cluster in which an installed command starts; relative paths start there."""
    storage: str = ""
    """Default of `--storage` for runs on this cluster: a folder that every node shares, or a URL."""
    cache: str = ""
    """Folder of each node for downloaded shards (DETR_CACHE)."""
    mlflow: str = ""
    """Address of MLflow as the cluster reaches it. Empty: MLFLOW_TRACKING_URI of this machine."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of every process of a job. No secrets: everyone who sees the job sees them."""
    secrets: dict[str, str] = field(default_factory=dict)
    """Variables that hold secrets, each with a reference: env:VARIABLE, file:/PATH or secret:NAME/KEY."""
    on_cluster: tuple[str, ...] = ()
    """Folders and URLs that only the cluster sees. What is below them is looked for there, not on this machine."""
    queue: str = ""
    """Queue of the launcher's scheduler."""
    priority: str = ""
    """Priority class of the launcher's scheduler."""
    time_limit: str = ""
    """Time after which a job is ended, such as 36h or 2d12h."""
    retries: int = 3
    """Number of times that the launcher starts a failed job again; the same command continues the run."""
    price_per_node_hour: float = 0.0
    """Price of a node for an hour, in the currency of your choice, for the forecast of costs."""

    def __post_init__(self) -> None:
        """Check what all entries have in common."""
        for name in self.has_not:
            if getattr(self, name):
                raise EntryError(f"{name} means nothing to {self.launcher}; expected no such key in this entry")
        self.time_limit_s  # noqa: B018
        if self.retries < 0:
            raise EntryError(f"retries is {self.retries}; expected 0 or more")
        if self.price_per_node_hour < 0:
            raise EntryError(f"price_per_node_hour is {self.price_per_node_hour}; expected 0 or more")
        for name in ("python", "directory"):
            if getattr(self, name).startswith("~"):
                raise EntryError(f"{name} is {getattr(self, name)!r}; expected it without ~, as the cluster sees it")
        for name, value in self.environment.items():
            _check_variable("environment", name)
            if is_sensitive(name) or holds_secret(value):
                raise EntryError(
                    f"environment.{name} would show a secret to everyone who sees the job; expected a reference to it in "
                    f'secrets, such as secrets.{name} = "env:{name}"'
                )
        for name, text in self.secrets.items():
            _check_variable("secrets", name)
            secret = parse_secret(text, f"secrets.{name}")
            if secret.kind not in self.secret_kinds:
                raise EntryError(
                    f"secrets.{name} is {secret.kind}:...; expected {' or '.join(self.secret_kinds)} with {self.launcher}"
                )
        if holds_secret(self.mlflow):
            raise EntryError(
                "mlflow holds a user name or password; expected an address without: give MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD as secrets"
            )

    @property
    def time_limit_s(self) -> int:
        """Time limit in seconds, 0 without."""
        return seconds_of(self.time_limit, "time_limit") if self.time_limit else 0

    @property
    def references(self) -> Mapping[str, Secret]:
        """The secrets by their variables."""
        return {name: parse_secret(text, f"secrets.{name}") for name, text in self.secrets.items()}

    @property
    def where(self) -> str:
        """Address, namespace, partition or region of the cluster, for the list."""
        names = ("address", "context", "namespace", "partition", "infra", "region", "head_host")
        return " ".join(value for name in names if (value := getattr(self, name, "")))

    def sees_alone(self, url: str) -> bool:
        """Return True if only the cluster sees this folder, file or URL."""
        return any(url == known.rstrip("/") or url.startswith(known.rstrip("/") + "/") for known in self.on_cluster)


def seconds_of(text: str, name: str) -> int:
    """Return the seconds of a time such as 2d12h."""
    if not re.fullmatch(r"(\d+[smhd])+", text):
        raise EntryError(f"{name} is {text!r}; expected numbers with d, h, m or s, such as 36h or 2d12h")
    return sum(int(count) * _UNITS[unit] for count, unit in re.findall(r"(\d+)([smhd])", text))


def _check_variable(table: str, name: str) -> None:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise EntryError(f"{table}.{name} is not the name of a variable; expected letters, digits and _")


def fields_of(kind: type[Struct]) -> Iterator[str]:
    """Yield the keys that a table of the file may have."""
    yield from (name for name in kind.__struct_fields__ if name != "name")
