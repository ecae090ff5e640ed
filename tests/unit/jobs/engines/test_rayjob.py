"""The RayJob for KubeRay: valid by the operator's schema and rules, with pods that have what training needs."""

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from jobs.clusters import find_cluster
from jobs.engines.rayjob_rules import broken_rules
from jobs.errors import JobError
from jobs.plan import make_plan
from jobs.refusals import read_request
from tests.support.entries import ELASTIC, entry
from tests.support.in_process import ROOT
from tests.support.plans import CODE, RECIPES, SIZES, WORDS, plan, render

RAYJOB_SCHEMA = ROOT.parent / "shared" / "schemas" / "rayjob-v1.schema.json.gz"


@cache
def rayjob_schema() -> jsonschema.Draft202012Validator:
    """The schema of the custom resource, which refuses unknown fields."""
    if not RAYJOB_SCHEMA.exists():
        pytest.skip(f"{RAYJOB_SCHEMA} is not here")

    def strict(node: Any) -> None:
        if isinstance(node, dict):
            closed = "properties" in node and not node.get("x-kubernetes-preserve-unknown-fields")
            if closed and "additionalProperties" not in node:
                node["additionalProperties"] = False
            if node.get("x-kubernetes-int-or-string"):
                node.pop("type", None)
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            strict(child)

    schema = json.loads(gzip.decompress(RAYJOB_SCHEMA.read_bytes()))
    strict(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("nodes", SIZES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_rayjob_is_valid_by_the_schema_of_the_operator(folder: Path, recipe: str, nodes: str) -> None:
    job = yaml.safe_load(render(plan(folder, "kuberay", recipe, nodes)))
    assert [error.message for error in rayjob_schema().iter_errors(job)] == []
    assert broken_rules(job) == []
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    assert (workers["minReplicas"] < workers["maxReplicas"]) is (nodes == ELASTIC)
    assert cluster["enableInTreeAutoscaling" if nodes == ELASTIC else "rayVersion"] in (True, ray.__version__)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("spec.backoffLimits", 3, "backoffLimits"),
        ("spec.backoffLimit", "3", "'3' is not of type 'integer'"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.groupName", None, "groupName"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.env.0.valu", "a", "valu"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.volumes.0.emptyDirs", {}, "emptyDirs"),
    ],
)
def test_schema_names_what_a_manifest_must_not_have(folder: Path, path: str, value: Any, named: str) -> None:
    job = yaml.safe_load(render(plan(folder, "kuberay")))
    change(job, path, value)
    assert any(named in error.message for error in rayjob_schema().iter_errors(job))


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("metadata.name", "a" * 48, "at most 47"),
        ("metadata.name", "Upper", "metadata.name"),
        ("spec.shutdownAfterJobFinishes", None, "ttlSecondsAfterFinished without shutdownAfterJobFinishes"),
        ("spec.backoffLimit", -1, "backoffLimit is negative"),
        ("spec.submissionMode", "InteractiveMode", "backoffLimit with clusterSelector or InteractiveMode"),
        ("spec.clusterSelector", {"a": "b"}, "backoffLimit with clusterSelector"),
        ("spec.activeDeadlineSeconds", 0, "activeDeadlineSeconds is not positive"),
        ("spec.deletionStrategy", {"deletionRules": []}, "deletionStrategy beside"),
        ("spec.runtimeEnvYAML", "- [", "runtimeEnvYAML is no YAML"),
        ("spec.rayClusterSpec.rayVersion", "2.51.0", "authOptions.mode token with rayVersion"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.minReplicas", 9, "minReplicas is 9 and maxReplicas is 8"),
        ("spec.rayClusterSpec.headGroupSpec.resources", {"CPU": "0"}, "resources beside rayStartParams"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.containers", [], "headGroupSpec has no container"),
    ],
)
def test_rules_that_the_schema_does_not_hold_are_checked(folder: Path, path: str, value: Any, named: str) -> None:
    job = yaml.safe_load(render(plan(folder, "kuberay")))
    change(job, path, value)
    assert any(named in line for line in broken_rules(job)), broken_rules(job)


def change(document: Any, path: str, value: Any) -> None:
    """Set the value at a path, or remove it."""
    *parents, last = path.split(".")
    for key in parents:
        document = document[int(key) if key.isdigit() else key]
    if value is None:
        del document[last]
    else:
        document[last] = value


def test_pods_of_a_rayjob_have_what_training_needs(folder: Path) -> None:
    job = yaml.safe_load(render(plan(folder, "kuberay")))
    cluster = job["spec"]["rayClusterSpec"]
    head, worker = cluster["headGroupSpec"], cluster["workerGroupSpecs"][0]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert cluster["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    for group in (head, worker):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] == "registry/detr@sha256:0123"
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) is (group is worker)
        assert {
            "name": "shm",
            "emptyDir": {"medium": "Memory", "sizeLimit": "4Gi" if group is head else "16Gi"},
        } in pod["volumes"]
        assert {"name": "coco", "mountPath": "/coco"} in container["volumeMounts"]
        assert pod["terminationGracePeriodSeconds"] >= 120
        assert pod["securityContext"] == {"fsGroup": 1000, "fsGroupChangePolicy": "OnRootMismatch"}
        variables = {variable["name"]: variable for variable in container["env"]}
        assert variables["MLFLOW_TRACKING_URI"]["value"] == "https://mlflow.example"
        reference = {"secretKeyRef": {"name": "aws", "key": "key"}}
        assert variables["AWS_SECRET_ACCESS_KEY"] == {"name": "AWS_SECRET_ACCESS_KEY", "valueFrom": reference}
    assert worker["template"]["spec"]["nodeSelector"] == {"nvidia.com/gpu.product": "H100"}
    assert job["spec"]["entrypoint"].endswith("--run detr-r50-16gpu-12ab34cd")


def test_volumes_keep_their_group_where_that_is_asked_or_there_are_none(folder: Path) -> None:
    for changes in ({"fs_group": 0}, {"volumes": {}}):
        job = yaml.safe_load(render(plan(folder, "kuberay", **changes)))
        head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
        assert "securityContext" not in head


def test_queue_and_priority_are_the_schedulers_labels(folder: Path) -> None:
    queued = plan(folder, "kuberay", scheduler="kueue", queue="team", priority="high")
    labels = yaml.safe_load(render(queued))["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == "team"
    assert labels["kueue.x-k8s.io/priority-class"] == "high"
    volcano = plan(folder, "kuberay", scheduler="volcano", queue="team")
    assert yaml.safe_load(render(volcano))["metadata"]["labels"]["volcano.sh/queue-name"] == "team"


def test_the_operators_refusal_is_an_error_before_anything_is_sent(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.engines.kuberay.broken_rules", lambda _: ["it is wrong"])
    with pytest.raises(JobError, match="the operator would refuse this RayJob: it is wrong"):
        render(plan(folder, "kuberay"))


def test_a_name_that_no_launcher_takes_becomes_one(folder: Path) -> None:
    (folder / "detr.toml").write_text(entry("kuberay"))
    cluster = find_cluster("it")
    for run in ("My_Run.v2" + "x" * 100, "7", "+=_"):
        request = read_request(cluster, ["train", "detr-r50-16gpu", *WORDS, *(["--run", run] if run != "+=_" else [])])
        job = make_plan(cluster, request, CODE, "12ab34cd", "")
        assert broken_rules({"metadata": {"name": job.job}, "spec": {"clusterSelector": {"a": "b"}}}) == []
        assert job.job.endswith("-12ab34cd")
