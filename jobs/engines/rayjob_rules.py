"""Rules of the KubeRay operator that its schema does not hold, and that it would refuse a job for later."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

_TOKENS_SINCE = (2, 52)
_RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")


def broken_rules(manifest: Mapping[str, Any]) -> list[str]:
    """Return a line for each rule that a RayJob breaks."""
    return [*_of_job(manifest), *_of_cluster(manifest["spec"].get("rayClusterSpec", {}), manifest["spec"])]


def _of_job(manifest: Mapping[str, Any]) -> Iterator[str]:
    name, spec = str(manifest["metadata"].get("name", "")), manifest["spec"]
    mode = spec.get("submissionMode", "K8sJobMode")
    if len(name) > 47 or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"metadata.name is {name!r}; expected at most 47 of a-z, 0-9 and -, a letter first"
    shutdown = spec.get("shutdownAfterJobFinishes", False)
    if spec.get("ttlSecondsAfterFinished", 0) < 0:
        yield "ttlSecondsAfterFinished is negative; expected 0 or more"
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not shutdown:
        yield "ttlSecondsAfterFinished without shutdownAfterJobFinishes; expected both"
    if spec.get("suspend") and not shutdown:
        yield "suspend without shutdownAfterJobFinishes; expected both"
    if spec.get("suspend") and spec.get("clusterSelector"):
        yield "suspend with clusterSelector; expected a cluster of the job's own"
    if spec.get("backoffLimit", 0) < 0:
        yield "backoffLimit is negative; expected 0 or more"
    if spec.get("backoffLimit", 0) > 0 and (spec.get("clusterSelector") or mode == "InteractiveMode"):
        yield "backoffLimit with clusterSelector or InteractiveMode; expected a cluster of the job's own"
    if "activeDeadlineSeconds" in spec and spec["activeDeadlineSeconds"] <= 0:
        yield "activeDeadlineSeconds is not positive; expected seconds"
    if not spec.get("rayClusterSpec") and not spec.get("clusterSelector"):
        yield "neither rayClusterSpec nor clusterSelector; expected one of them"
    if mode == "SidecarMode":
        if spec.get("submitterPodTemplate") or spec.get("submitterConfig"):
            yield "SidecarMode with submitterPodTemplate or submitterConfig; expected neither"
        if _pod(spec["rayClusterSpec"]["headGroupSpec"]).get("restartPolicy", "Never") != "Never":
            yield "SidecarMode with a head whose restartPolicy is not Never"
    if spec.get("deletionStrategy") and (shutdown or spec.get("ttlSecondsAfterFinished")):
        yield "deletionStrategy beside shutdownAfterJobFinishes or ttlSecondsAfterFinished; expected only one way"
    try:
        parsed = yaml.safe_load(spec.get("runtimeEnvYAML", "")) or {}
    except yaml.YAMLError:
        parsed = None
    if not isinstance(parsed, dict):
        yield "runtimeEnvYAML is no YAML of a runtime environment"
    labels = manifest["metadata"].get("labels", {})
    if "kueue.x-k8s.io/queue-name" in labels:
        yield from _of_kueue(spec)


def _of_kueue(spec: Mapping[str, Any]) -> Iterator[str]:
    cluster = spec.get("rayClusterSpec", {})
    if spec.get("clusterSelector"):
        yield "Kueue with clusterSelector; expected a cluster of the job's own"
    if not spec.get("shutdownAfterJobFinishes"):
        yield "Kueue without shutdownAfterJobFinishes; expected it"
    if cluster.get("enableInTreeAutoscaling"):
        yield "Kueue with autoscaling; expected a fixed number of nodes, since it starts all or none"
    if len(cluster.get("workerGroupSpecs", [])) > 7:
        yield "Kueue with more than 7 groups of workers"


def _of_cluster(cluster: Mapping[str, Any], spec: Mapping[str, Any]) -> Iterator[str]:
    if not cluster:
        return
    head = cluster.get("headGroupSpec", {})
    if not _pod(head).get("containers"):
        yield "headGroupSpec has no container"
    groups = [
        ("headGroupSpec", head),
        *((str(group.get("groupName")), group) for group in cluster.get("workerGroupSpecs", [])),
    ]
    names = [name for name, _ in groups]
    if len(set(names)) < len(names):
        yield "two groups of workers have the same name"
    for name, group in groups:
        if group.get("resources") and any(key in group.get("rayStartParams", {}) for key in _RESOURCE_PARAMS):
            yield f"{name} has resources beside rayStartParams with resources; expected one of them"
        if not _pod(group).get("containers"):
            yield f"{name} has no container"
        fewest, most = group.get("minReplicas", 0), group.get("maxReplicas", 2**31)
        if fewest > most:
            yield f"{name}.minReplicas is {fewest} and maxReplicas is {most}; expected minReplicas <= maxReplicas"
        if not fewest <= group.get("replicas", fewest) <= most:
            yield f"{name}.replicas is {group['replicas']}; expected minReplicas to maxReplicas"
    auth = cluster.get("authOptions", {})
    version = tuple(int(number) for number in re.findall(r"\d+", cluster.get("rayVersion", ""))[:2])
    if auth.get("mode") == "token" and version < _TOKENS_SINCE:
        yield f"authOptions.mode token with rayVersion {cluster.get('rayVersion')!r}; expected 2.52.0 or later"
    if cluster.get("autoscalerOptions", {}).get("version") == "v2":
        for name, group in groups:
            if _pod(group).get("restartPolicy", "Never") != "Never":
                yield f"{name}: the autoscaler v2 needs restartPolicy Never"


def _pod(group: Mapping[str, Any]) -> Mapping[str, Any]:
    spec: Mapping[str, Any] = group.get("template", {}).get("spec", {})
    return spec
