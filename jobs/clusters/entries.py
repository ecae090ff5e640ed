"""Entries of the file of clusters, one class per launcher; their fields are the keys of the file.

Every class checks what it can know by itself. Names of fields are what users write, so they rarely change.
"""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from msgspec import field

from jobs.clusters.common import Cluster, EntryError, Head, Nodes, fields_of, seconds_of
from jobs.clusters.secret import parse_secret
from pipeline.tracking.server.address import holds_secret

__all__ = [
    "ENTRIES",
    "Cluster",
    "Entry",
    "EntryError",
    "Head",
    "KubeRay",
    "Nodes",
    "Ray",
    "RayUp",
    "Sky",
    "Slurm",
    "fields_of",
]

_LEAST_GRACE_S = 120
"""Seconds in which a run surely saves and its nodes end."""


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
    fs_group: int = 1000
    """Group that may write to `volumes`, since the image's user (1000 in this project's Dockerfile) is not root.
    0: leave the volumes as they are."""
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
        if self.grace_s < _LEAST_GRACE_S:
            raise EntryError(f"grace_s is {self.grace_s}; expected at least {_LEAST_GRACE_S}, in which a run saves")
        if self.fs_group < 0:
            raise EntryError(f"fs_group is {self.fs_group}; expected the number of a group, or 0")
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
        if self.signal_s < _LEAST_GRACE_S:
            raise EntryError(
                f"signal_s is {self.signal_s}; expected at least {_LEAST_GRACE_S}: a run saves, its nodes end, and the job "
                "queues again in that time"
            )
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


Entry = Ray | KubeRay | Slurm | Sky | RayUp
ENTRIES: dict[str, type[Cluster]] = {kind.launcher: kind for kind in (Ray, KubeRay, Slurm, Sky, RayUp)}
