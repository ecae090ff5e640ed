"""The manifest of a RayJob, `ray.io/v1`, in types: the fields that are used here, as the operator spells them."""

from __future__ import annotations

from typing import Any

from msgspec import Struct, field


class _Object(Struct, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    """An object of a manifest; fields with their defaults are left out."""


class Metadata(_Object, frozen=True, kw_only=True):
    """Name, labels and notes."""

    name: str = ""
    namespace: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)


class EnvVar(_Object, frozen=True, kw_only=True):
    """A variable: a value, or a reference to a key of a Secret."""

    name: str
    value: str | None = None
    value_from: dict[str, Any] | None = None


class VolumeMount(_Object, frozen=True, kw_only=True):
    """Folder of a pod where a volume is seen."""

    name: str
    mount_path: str


class Container(_Object, frozen=True, kw_only=True):
    """The container that runs Ray."""

    name: str
    image: str
    env: list[EnvVar]
    resources: dict[str, dict[str, str]]
    volume_mounts: list[VolumeMount]
    working_dir: str = ""


class PodSpec(_Object, frozen=True, kw_only=True):
    """Containers of a pod, and nodes that may run it."""

    containers: list[Container]
    volumes: list[dict[str, Any]]
    termination_grace_period_seconds: int
    restart_policy: str = ""
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[dict[str, str]] = field(default_factory=list)
    service_account_name: str = ""
    image_pull_secrets: list[dict[str, str]] = field(default_factory=list)
    security_context: dict[str, Any] = field(default_factory=dict)


class PodTemplate(_Object, frozen=True, kw_only=True):
    """Template of the pods of a group."""

    spec: PodSpec
    metadata: Metadata | None = None


class HeadGroup(_Object, frozen=True, kw_only=True):
    """The head, which runs the driver and no worker."""

    ray_start_params: dict[str, str]
    template: PodTemplate


class WorkerGroup(_Object, frozen=True, kw_only=True):
    """Nodes for workers."""

    group_name: str
    replicas: int
    min_replicas: int
    max_replicas: int
    ray_start_params: dict[str, str]
    template: PodTemplate


class RayCluster(_Object, frozen=True, kw_only=True):
    """The Ray cluster of a job."""

    ray_version: str
    auth_options: dict[str, str]
    head_group_spec: HeadGroup
    worker_group_specs: list[WorkerGroup]
    enable_in_tree_autoscaling: bool = False
    autoscaler_options: dict[str, Any] = field(default_factory=dict)


class Spec(_Object, frozen=True, kw_only=True):
    """The job."""

    entrypoint: str
    submission_mode: str
    runtime_env_yaml: str = field(name="runtimeEnvYAML")
    backoff_limit: int = -1
    active_deadline_seconds: int = 0
    pre_running_deadline_seconds: int = 0
    shutdown_after_job_finishes: bool = False
    ttl_seconds_after_finished: int = 0
    metadata: dict[str, str] = field(default_factory=dict)
    ray_cluster_spec: RayCluster


class RayJob(_Object, frozen=True, kw_only=True):
    """The manifest."""

    api_version: str = field(name="apiVersion")
    kind: str
    metadata: Metadata
    spec: Spec
