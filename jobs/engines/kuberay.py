"""KubeRay: each job is a RayJob, whose operator starts a Ray cluster for it, and another one for each retry."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
import time
from datetime import datetime
from typing import Any, ClassVar, TextIO

import msgspec

from jobs.clusters.entries import KubeRay
from jobs.engines import client
from jobs.engines.engine import ENDED, Job, Say, State
from jobs.engines.rayjob import (
    Container,
    EnvVar,
    HeadGroup,
    Metadata,
    PodSpec,
    PodTemplate,
    RayCluster,
    RayJob,
    Spec,
    VolumeMount,
    WorkerGroup,
)
from jobs.engines.rayjob_rules import broken_rules
from jobs.engines.yaml_text import dump
from jobs.errors import JobError
from jobs.plan import GRACE_S, Plan

_LOOK_S = 2.0
_HEAD_SHM_GIB = 4
_COMMAND = "detr/command"
_QUICKLY = "--request-timeout=10s"  # of an answer; it would cut a log that is followed
_STATES: dict[str, State] = {
    "Running": "RUNNING",
    "Complete": "SUCCEEDED",
    "Failed": "FAILED",
    "ValidationFailed": "FAILED",
}  # all others wait


class KubeRayEngine:
    """Client of kubectl."""

    suffix: ClassVar[str] = ".yaml"

    def render(self, plan: Plan) -> str:
        """Return the manifest; raise `JobError` for what the operator would refuse."""
        manifest: dict[str, Any] = msgspec.to_builtins(rayjob(plan))
        broken = broken_rules(manifest)
        if broken:
            raise JobError(f"the operator would refuse this RayJob: {broken[0]}")
        return dump(manifest)

    def by_hand(self, plan: Plan, file: str) -> list[str]:
        """Return the command that creates the RayJob."""
        return [shlex.join([*_kubectl(plan.cluster), "create", "-f", file])]

    def submit(self, plan: Plan, say: Say) -> str:
        """Create the RayJob."""
        client.run(*_kubectl(plan.cluster), "create", "-f", "-", _QUICKLY, input_text=self.render(plan))
        return plan.job

    def status(self, cluster: KubeRay, job: str) -> Job:
        """Return the RayJob."""
        return _job(json.loads(client.run(*_kubectl(cluster), "get", "rayjob", job, _QUICKLY, "-o", "json")))

    def logs(self, cluster: KubeRay, job: str, stream: TextIO, *, follow: bool = False) -> None:
        """Copy the output of the pods that submit the job, one for each try, which show the driver's."""
        flags = ["--follow", "--tail=-1"] if follow else ["--tail=-1"]
        state = self.status(cluster, job).state
        while follow and state == "PENDING":
            time.sleep(_LOOK_S)
            state = self.status(cluster, job).state
        pods = client.run(*_kubectl(cluster), "get", "pod", _QUICKLY, "-l", f"job-name={job}", "-o", "name").strip()
        if not pods or client.stream(stream, *_kubectl(cluster), "logs", "-l", f"job-name={job}", *flags):
            raise JobError(f"job {job} has no log ({state}); expected a pod that runs: kubectl describe rayjob {job}")
        final = self.status(cluster, job).state
        if follow and final != "SUCCEEDED":
            raise JobError(f"job {job} ended as {final}; its log says why")

    def stop(self, cluster: KubeRay, job: str) -> str:
        """Stop the driver through Ray, so that it saves, and wait; a job without a driver is deleted."""
        known = json.loads(client.run(*_kubectl(cluster), "get", "rayjob", job, _QUICKLY, "-o", "json"))
        if _job(known).state in ENDED:
            return f"{job} had already ended"
        status = known.get("status", {})
        if _job(known).state == "PENDING":
            client.run(*_kubectl(cluster), "delete", "rayjob", job, "--wait=false")
            return f"{job} stopped before it ran"
        labels = f"ray.io/cluster={status.get('rayClusterName')},ray.io/node-type=head"
        head = client.run(*_kubectl(cluster), "get", "pod", "-l", labels, "-o", "name").strip()
        words = ["ray", "job", "stop", str(status.get("jobId")), "--address", "http://127.0.0.1:8265"]
        client.run(*_kubectl(cluster), "exec", head, "--", *words, seconds=GRACE_S + 30)
        until = time.monotonic() + GRACE_S
        while time.monotonic() < until:
            if self.status(cluster, job).state in ENDED:
                return f"{job} stopped"
            time.sleep(_LOOK_S)
        raise JobError(f"job {job} did not end within {GRACE_S} s; see `kubectl describe rayjob {job}`")

    def list(self, cluster: KubeRay) -> list[Job]:
        """Return the RayJobs that this command has made."""
        words = ["get", "rayjob", _QUICKLY, "-l", "app.kubernetes.io/managed-by=detr", "-o", "json"]
        items = json.loads(client.run(*_kubectl(cluster), *words))["items"]
        return sorted(map(_job, items), key=lambda job: job.started or 0, reverse=True)


def rayjob(plan: Plan) -> RayJob:
    """Return the manifest of a plan."""
    cluster = _kuberay(plan)
    nodes = cluster.nodes
    assert nodes is not None  # the entry's own check
    elastic = nodes.elastic
    env = [EnvVar(name=name, value=value) for name, value in plan.environment.items()]
    for name, secret in plan.secrets.items():
        reference = {"secretKeyRef": {"name": secret.where, "key": secret.key}}
        env.append(EnvVar(name=name, value_from=reference))
    head = cluster.head
    head_resources = {"cpu": str(head.cpus), "memory": f"{head.memory_gib}Gi"}
    worker_resources = {"cpu": str(nodes.cpus), "memory": f"{nodes.memory_gib}Gi"}
    if nodes.gpus:
        worker_resources["nvidia.com/gpu"] = str(nodes.gpus)
    selector = dict(cluster.node_selector)
    if nodes.accelerator:
        label, _, value = nodes.accelerator.rpartition("=")
        selector[label or "nvidia.com/gpu.product"] = value
    stop = {"RAY_JOB_STOP_SIGNAL": "SIGTERM", "RAY_JOB_STOP_WAIT_TIME_S": str(GRACE_S)}
    return RayJob(
        api_version="ray.io/v1",
        kind="RayJob",
        metadata=Metadata(
            name=plan.job,
            namespace=cluster.namespace,
            labels=_labels(cluster, plan),
            annotations={_COMMAND: plan.shown},
        ),
        spec=Spec(
            entrypoint=shlex.join(plan.command),  # the operator's shell reads it, so it holds words only
            submission_mode="K8sJobMode",
            runtime_env_yaml=dump({"env_vars": stop}),
            backoff_limit=plan.retries,
            active_deadline_seconds=cluster.time_limit_s,
            pre_running_deadline_seconds=cluster.start_limit_s,
            shutdown_after_job_finishes=True,
            ttl_seconds_after_finished=cluster.keep_s,
            metadata={"run": plan.run} if plan.run else {},  # the operator's shell would expand a dollar sign
            ray_cluster_spec=RayCluster(
                ray_version=importlib.metadata.version("ray"),
                auth_options={
                    "mode": "token",
                    **({"secretName": cluster.token_secret} if cluster.token_secret else {}),
                },
                enable_in_tree_autoscaling=elastic,
                autoscaler_options={"version": "v2"} if elastic else {},
                head_group_spec=HeadGroup(
                    ray_start_params={"num-cpus": "0", "dashboard-host": "0.0.0.0"},
                    template=_pod(cluster, "ray-head", env, head_resources, cluster.head_node_selector, elastic),
                ),
                worker_group_specs=[
                    WorkerGroup(
                        group_name="workers",
                        replicas=nodes.most,
                        min_replicas=nodes.fewest,
                        max_replicas=nodes.most,
                        ray_start_params={},
                        template=_pod(cluster, "ray-worker", env, worker_resources, selector, elastic),
                    )
                ],
            ),
        ),
    )


def _labels(cluster: KubeRay, plan: Plan) -> dict[str, str]:
    labels = {"app.kubernetes.io/managed-by": "detr"}
    if cluster.scheduler == "kueue":
        labels["kueue.x-k8s.io/queue-name"] = cluster.queue
        if cluster.priority:
            labels["kueue.x-k8s.io/priority-class"] = cluster.priority
    elif cluster.scheduler == "volcano":
        labels["volcano.sh/queue-name"] = cluster.queue
        if cluster.priority:
            labels["ray.io/priority-class-name"] = cluster.priority
    elif cluster.scheduler == "yunikorn":
        labels |= {"ray.io/gang-scheduling-enabled": "true", "yunikorn.apache.org/queue": cluster.queue}
        labels["yunikorn.apache.org/app-id"] = plan.job
    return labels


def _pod(
    cluster: KubeRay,
    name: str,
    env: list[EnvVar],
    resources: dict[str, str],
    selector: dict[str, str],
    elastic: bool,
) -> PodTemplate:
    volumes: list[dict[str, Any]] = []
    mounts = []
    for claim, folder in cluster.volumes.items():
        volumes.append({"name": claim, "persistentVolumeClaim": {"claimName": claim}})
        mounts.append(VolumeMount(name=claim, mount_path=folder))
    worker = name == "ray-worker"
    shm_gib = cluster.shm_gib if worker else min(cluster.shm_gib, _HEAD_SHM_GIB)
    volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shm_gib}Gi"}})
    mounts.append(VolumeMount(name="shm", mount_path="/dev/shm"))
    if worker and cluster.cache:
        limit = {"sizeLimit": f"{cluster.scratch_gib}Gi"} if cluster.scratch_gib else {}
        volumes.append({"name": "detr-cache", "emptyDir": limit})
        mounts.append(VolumeMount(name="detr-cache", mount_path=cluster.cache))
    spec = PodSpec(
        containers=[
            Container(
                name=name,
                image=cluster.image,
                env=env,
                resources={"limits": resources, "requests": resources},
                volume_mounts=mounts,
                working_dir=cluster.directory,
            )
        ],
        volumes=volumes,
        termination_grace_period_seconds=cluster.grace_s,
        restart_policy="Never" if elastic else "",
        node_selector=selector,
        tolerations=[{"key": key, "operator": "Exists"} for key in cluster.tolerations] if worker else [],
        service_account_name=cluster.service_account,
        image_pull_secrets=[{"name": cluster.image_pull_secret}] if cluster.image_pull_secret else [],
        security_context=_group_of_volumes(cluster),
    )
    return PodTemplate(spec=spec)


def _group_of_volumes(cluster: KubeRay) -> dict[str, Any]:
    """Return the security context in which the image's user, who is not root, can write to the volumes."""
    if not cluster.volumes or not cluster.fs_group:
        return {}
    # Without the policy every start of a pod would go through all files of a volume.
    return {"fsGroup": cluster.fs_group, "fsGroupChangePolicy": "OnRootMismatch"}


def _kubectl(cluster: Any) -> list[str]:
    context = [f"--context={cluster.context}"] if cluster.context else []
    return ["kubectl", *context, f"--namespace={cluster.namespace}"]


def _job(item: dict[str, Any]) -> Job:
    status, spec = item.get("status", {}), item["spec"]
    state = _STATES.get(status.get("jobDeploymentStatus", ""), "PENDING")
    if status.get("jobStatus") == "STOPPED":
        state = "STOPPED"
    begun = status.get("startTime") or item["metadata"].get("creationTimestamp", "")
    reason = " ".join(filter(None, (status.get("reason", ""), status.get("message", ""))))
    if not reason and state == "PENDING":
        reason = status.get("jobDeploymentStatus", "") or "the operator has not looked at it"
    started = datetime.fromisoformat(begun).timestamp() if begun else None
    command = item["metadata"].get("annotations", {}).get(_COMMAND, spec.get("entrypoint", ""))
    return Job(item["metadata"]["name"], state, started, command, spec.get("metadata", {}).get("run", ""), reason)


def _kuberay(plan: Plan) -> KubeRay:
    assert isinstance(plan.cluster, KubeRay)
    return plan.cluster
