"""Entries of the file of clusters, one class per launcher; their fields are the keys of the file.

Every class checks what it can know by itself. Names of fields are what users write, so they rarely change.
"""

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


class Ray(Cluster, frozen=True, kw_only=True, tag_field="launcher", tag="ray"):
    """A running Ray cluster with a job server."""

    launcher: ClassVar[str] = "ray"
    secret_kinds: ClassVar[tuple[str, ...]] = ("env",)
    has_not: ClassVar[tuple[str, ...]] = ("queue", "priority", "time_limit")

    address: str
    """URL of the job server, http(s)://HOST:8265."""
    token: str = ""
    """Reference to the cluster's token (env:VARIABLE or file:/PATH). It is sent to `address` only."""
    requirements: Literal["installed", "lock"] = "installed"
    """Libraries of a snapshot. installed: the nodes have them. lock: each node installs requirements.lock for the job."""
    driver_cpus: float = 0
    """CPUs that the driver reserves. With 0 and no labels or resources, Ray starts it on the head."""
    driver_resources: dict[str, float] = field(default_factory=dict)
    """Resources that the driver reserves, such as {driver = 1} of nodes that stay."""
    driver_labels: dict[str, str] = field(default_factory=dict)
    """Labels of nodes that may run the driver, such as {"ray.io/market-type" = "on-demand"}: it should not run on spot."""

    def __post_init__(self) -> None:
        """Check the address and the token."""
        super().__post_init__()
        if not re.match(r"https?://[^/\s]+", self.address):
            raise EntryError(
                f"address is {self.address!r}; expected the URL of the job server, such as http://HOST:8265"
            )
        if holds_secret(self.address):
            raise EntryError("address holds a user name or password; expected none: give `token`, a reference")
        for name, secret in self.references.items():
            if secret.where != name:
                raise EntryError(
                    f"secrets.{name} is {secret}; expected env:{name} with ray: set it where Ray is started on every node"
                )
        if self.token and parse_secret(self.token, "token").kind == "secret":
            raise EntryError("token is a Secret of Kubernetes; expected env:VARIABLE or file:/PATH of this machine")


class KubeRay(Cluster, frozen=True, kw_only=True, tag_field="launcher", tag="kuberay"):
    """A Kubernetes cluster with the KubeRay operator: each job is a RayJob with a Ray cluster of its own."""

    launcher: ClassVar[str] = "kuberay"
    secret_kinds: ClassVar[tuple[str, ...]] = ("secret",)

    code: Literal["installed"] = "installed"
    """The image holds the code."""
    image: str
    """Image with this release, best by digest: registry/detr@sha256:..."""
    namespace: str = "default"
    context: str = ""
    """Context of kubectl. Empty: the current one."""
    head: Head = Head()
    volumes: dict[str, str] = field(default_factory=dict)
    """Persistent volume claims by name, each with the folder where pods see it."""
    scratch_gib: int = 0
    """Size of the folder of each node for downloaded shards; 0: no limit. Needs `cache`."""
    shm_gib: int = 16
    """Size of /dev/shm of each worker's pod, which is memory."""
    node_selector: dict[str, str] = field(default_factory=dict)
    head_node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: tuple[str, ...] = ()
    """Keys of taints that workers tolerate, such as nvidia.com/gpu."""
    service_account: str = ""
    image_pull_secret: str = ""
    token_secret: str = ""
    """Kubernetes Secret with the key auth_token that Ray's processes of the job share. Empty: the operator makes one."""
    scheduler: Literal["", "kueue", "volcano", "yunikorn"] = ""
    """Scheduler of `queue` and `priority`; all of them start a job's pods together or not at all."""
    keep_s: int = 600
    """Seconds that the pods of a finished job are kept, for looking at them."""
    start_limit: str = "1h"
    """Time after which a job that has not started running is ended."""
    grace_s: int = 120
    """Seconds that a pod has to save before it is killed."""

    def __post_init__(self) -> None:
        """Check what Kubernetes and the operator want."""
        super().__post_init__()
        if self.nodes is None or not self.nodes.cpus or not self.nodes.memory_gib:
            raise EntryError("nodes needs cpus and memory_gib with kuberay; expected what each pod of a worker may use")
        if self.grace_s < 120:
            raise EntryError(f"grace_s is {self.grace_s}; expected at least 120, in which a run saves")
        if self.queue and not self.scheduler:
            raise EntryError("queue without scheduler; expected scheduler kueue, volcano or yunikorn")
        if self.scheduler and not self.queue:
            raise EntryError(f"scheduler {self.scheduler} without queue; expected the queue's name")
        if self.scheduler == "kueue" and self.nodes.elastic:
            raise EntryError("nodes has min and max with kueue, which starts all or none; expected count")
        if any(not folder.startswith("/") for folder in self.volumes.values()):
            raise EntryError('volumes needs absolute folders; expected {"claim" = "/folder"}')
        self.start_limit_s  # noqa: B018

    @property
    def start_limit_s(self) -> int:
        """Limit of the start in seconds."""
        return seconds_of(self.start_limit, "start_limit")


class Slurm(Cluster, frozen=True, kw_only=True, tag_field="launcher", tag="slurm"):
    """A Slurm cluster: each job starts a Ray cluster of its own on its nodes."""

    launcher: ClassVar[str] = "slurm"

    nodes: Nodes
    partition: str = ""
    account: str = ""
    qos: str = ""
    setup: tuple[str, ...] = ()
    """Lines of the shell that every node runs first, such as "module load python/3.12"."""
    options: tuple[str, ...] = ()
    """Further options of sbatch, such as "--constraint=h100"."""
    signal_s: int = 300
    """Seconds before the time limit at which the run saves and the job queues again."""
    job_folder: str = "."
    """Folder that every node sees, for the job's script, snapshot and log."""

    def __post_init__(self) -> None:
        """Check what goes into lines of the script."""
        super().__post_init__()
        for name in ("job_folder", "partition", "account", "qos"):
            if re.search(r"[\s\"'`$;]", getattr(self, name)):
                raise EntryError(
                    f"{name} is {getattr(self, name)!r}; expected no blanks and quotes: sbatch would not read it"
                )
        if any("\n" in option or not option.startswith("-") for option in self.options):
            raise EntryError('options must begin with -; expected options of sbatch, such as ["--constraint=h100"]')
        if self.time_limit and self.time_limit_s <= self.signal_s:
            raise EntryError(f"time_limit is {self.time_limit}; expected more than signal_s, {self.signal_s} s")


class Sky(Cluster, frozen=True, kw_only=True, tag_field="launcher", tag="sky"):
    """Machines of clouds or Kubernetes that SkyPilot rents, as managed jobs."""

    launcher: ClassVar[str] = "sky"
    secret_kinds: ClassVar[tuple[str, ...]] = ("env",)
    has_not: ClassVar[tuple[str, ...]] = ("queue", "time_limit")

    nodes: Nodes
    infra: str = ""
    """Cloud, region or Kubernetes context, such as aws/us-east-1; empty: the cheapest."""
    image: str = ""
    """Image of the machines, such as docker:registry/detr@sha256:..."""
    disk_gib: int = 256
    setup: tuple[str, ...] = ()
    """Lines of the shell that every node runs first. Empty: with a snapshot, install requirements.lock."""
    mounts: dict[str, str] = field(default_factory=dict)
    """Buckets by the folder where nodes see them, such as {"/data" = "s3://bucket/data"}."""


class RayUp(Cluster, frozen=True, kw_only=True, tag_field="launcher", tag="ray_up"):
    """Machines that Ray's own launcher (`ray up`) starts, of a cloud or of your own."""

    launcher: ClassVar[str] = "ray_up"
    secret_kinds: ClassVar[tuple[str, ...]] = ("file",)
    has_not: ClassVar[tuple[str, ...]] = ("queue", "priority", "time_limit")

    nodes: Nodes
    provider: Literal["aws", "gcp", "azure", "local"]
    head: Head = Head()
    region: str = ""
    instance: str = ""
    """Type of the workers' machines."""
    head_host: str = ""
    """Host of the head, with the provider local."""
    hosts: tuple[str, ...] = ()
    """Hosts of the workers, with the provider local."""
    ssh_user: str = "ubuntu"
    ssh_key: str = ""
    """File of the private key on this machine."""
    token: str = "~/.ray/auth_token"
    """File on this machine with the token that all nodes share; `ray get-auth-token --generate` makes it."""
    image: str = ""
    """Docker image in which everything runs; empty: the machines themselves."""
    setup: tuple[str, ...] = ()
    """Lines of the shell that every node runs once."""

    def __post_init__(self) -> None:
        """Check what the provider wants."""
        super().__post_init__()
        if self.provider == "local":
            if not self.head_host or len(self.hosts) != self.nodes.most:
                raise EntryError(
                    f"hosts has {len(self.hosts)} hosts; expected head_host and {self.nodes.most} hosts of workers"
                )
        elif not self.instance or not self.head.instance:
            raise EntryError(f"provider {self.provider} needs instance and head.instance; expected types of machines")


def seconds_of(text: str, name: str) -> int:
    """Return the seconds of a time such as 2d12h."""
    if not re.fullmatch(r"(\d+[smhd])+", text):
        raise EntryError(f"{name} is {text!r}; expected numbers with d, h, m or s, such as 36h or 2d12h")
    return sum(int(count) * _UNITS[unit] for count, unit in re.findall(r"(\d+)([smhd])", text))


Entry = Ray | KubeRay | Slurm | Sky | RayUp
ENTRIES: dict[str, type[Cluster]] = {kind.launcher: kind for kind in (Ray, KubeRay, Slurm, Sky, RayUp)}


def _check_variable(table: str, name: str) -> None:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise EntryError(f"{table}.{name} is not the name of a variable; expected letters, digits and _")


def fields_of(kind: type[Struct]) -> Iterator[str]:
    """Yield the keys that a table of the file may have."""
    yield from (name for name in kind.__struct_fields__ if name != "name")
