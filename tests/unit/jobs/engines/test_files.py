"""The files that engines write: valid by the launcher's own schema or by a lint, for every recipe of a cluster size."""

import gzip
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
import ray
import ray.runtime_env
import yaml
from packaging.requirements import Requirement

from jobs.clusters import Cluster, find_cluster
from jobs.code import Code
from jobs.engines import engine_of
from jobs.engines.rayjob_rules import broken_rules
from jobs.errors import JobError
from jobs.plan import Plan, Request, make_plan
from jobs.refusals import read_request
from tests.support.entries import ELASTIC, FIXED, entry
from tests.support.in_process import ROOT

RAYJOB_SCHEMA = ROOT.parent / "shared" / "schemas" / "rayjob-v1.schema.json.gz"
RECIPES = ["detr-r50-8gpu", "detr-r50-16gpu", "detr-r50-64gpu", "detr-r50-64gpu-b256"]
SIZES = [FIXED, ELASTIC]
SKY_KEYS = {
    "name", "workdir", "num_nodes", "resources", "envs", "secrets", "file_mounts", "setup", "run", "config", "service",
    "volumes", "experimental", "inputs", "outputs", "pool",
}  # fmt: skip
SKY_RESOURCES = {
    "infra", "accelerators", "accelerator_args", "cpus", "memory", "instance_type", "use_spot", "disk_size", "disk_tier",
    "network_tier", "ports", "image_id", "labels", "any_of", "ordered", "job_recovery", "autostop", "priority",
}  # fmt: skip
CODE = Code(ROOT, "0" * 40, ("jobs/code.py",))
WORDS = ["--data.train", "s3://bucket/it's train", "--data.val", "s3://bucket/val"]


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(folder: Path, launcher: str, recipe: str = "detr-r50-16gpu", nodes: str = FIXED, **changes: Any) -> Plan:
    (folder / "detr.toml").write_text(entry(launcher, nodes))
    cluster: Cluster = msgspec.structs.replace(find_cluster("it"), **changes)
    elastic = ["--cluster.min-workers", "8"] if nodes == ELASTIC else []
    request = read_request(cluster, ["train", recipe, *WORDS, *elastic])
    return make_plan(cluster, request, CODE, "12ab34cd", "http://unused")


def render(plan: Plan) -> str:
    return engine_of(plan.cluster).render(plan)


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


def shellcheck(script: str) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("shellcheck"), "--shell=bash", "-"],
        input=script,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


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


def test_libraries_of_a_snapshot_are_those_of_the_lock(folder: Path) -> None:
    """Ray's own check of a runtime environment takes them, and so does the job server."""
    (folder / "detr.toml").write_text(entry("ray").replace("[clusters.it]\n", '[clusters.it]\nrequirements = "lock"\n'))
    cluster = find_cluster("it")
    made = make_plan(cluster, read_request(cluster, ["train", "detr-r50-16gpu", *WORDS]), CODE, "12ab34cd", "")
    runtime = json.loads(render(made))["runtime_env"]
    packages = runtime["pip"]["packages"]
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    assert packages == [line for line in lines if line and not line.startswith("#")]
    assert all("==" in str(Requirement(package).specifier) for package in packages)
    assert {"ray", "torch", "mlflow"} <= {Requirement(package).name for package in packages}
    checked = ray.runtime_env.RuntimeEnv(**runtime)
    assert checked.pip_config()["packages"] == packages
    assert checked.pip_config()["pip_check"] is False


def test_queue_and_priority_are_the_schedulers_labels(folder: Path) -> None:
    queued = plan(folder, "kuberay", scheduler="kueue", queue="team", priority="high")
    labels = yaml.safe_load(render(queued))["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == "team"
    assert labels["kueue.x-k8s.io/priority-class"] == "high"
    volcano = plan(folder, "kuberay", scheduler="volcano", queue="team")
    assert yaml.safe_load(render(volcano))["metadata"]["labels"]["volcano.sh/queue-name"] == "team"


@pytest.mark.parametrize(
    ("status", "warned", "stopped", "cleaned", "queued"),
    [(0, 0, False, True, False), (75, 0, False, True, True), (75, 1, False, False, True), (75, 1, True, True, False)],
)
def test_a_slurm_job_at_its_time_limit_queues_again_before_anything_else(
    status: int, warned: int, stopped: bool, cleaned: bool, queued: bool, folder: Path
) -> None:
    script = render(plan(folder, "slurm"))
    end = script[script.index("# After an error Ray") : script.rindex("exit ")]
    if stopped:
        (folder / "stopped").touch()
    given = f"folder={folder} status={status} warned={warned} DETR_NODE_FOLDER={folder}/node SLURM_JOB_ID=7"
    stand_ins = "timeout() { echo cleaned; }; scontrol() { echo queued; }"
    done = subprocess.run(
        ["bash", "-euc", f"{given}; {stand_ins}; {end}"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert ("cleaned" in done, "queued" in done) == (cleaned, queued)


@pytest.mark.parametrize("nodes", SIZES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_script_for_slurm_passes_shellcheck(folder: Path, recipe: str, nodes: str) -> None:
    script = render(plan(folder, "slurm", recipe, nodes))
    shellcheck(script)
    options = {line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")}
    assert {
        "--ntasks-per-node=1",
        "--gpus-per-node=H100:8",
        "--requeue",
        "--open-mode=append",
        "--time=2-12:00:00",
    } <= options
    assert {"--signal=B:TERM@300", "--partition=gpu", "--account=vision", "--qos=high", "--constraint=ib"} <= options
    assert ("--nodes=1-8" if nodes == ELASTIC else "--nodes=8") in options
    assert "ray stop" not in script
    assert (
        'srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}" --cpu-bind=none'
        in script
    )


def test_a_command_that_does_not_continue_is_not_started_again(folder: Path) -> None:
    for launcher in ("slurm", "sky", "kuberay"):
        (folder / "detr.toml").write_text(entry(launcher))
        cluster = find_cluster("it")
        for words in (["demo"], ["clusters", "probe", "detr-r50"]):
            text = render(make_plan(cluster, Request(tuple(words)), CODE, "12ab34cd", "http://unused"))
            if launcher == "slurm":
                shellcheck(text)
                assert "#SBATCH --no-requeue\n" in text
                assert "scontrol requeue" not in text
            elif launcher == "sky":
                assert yaml.safe_load(text)["resources"]["job_recovery"] == {"max_restarts_on_errors": 0}
            else:
                assert yaml.safe_load(text)["spec"]["backoffLimit"] == 0


@pytest.mark.parametrize("nodes", SIZES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_task_for_skypilot_has_known_keys_and_scripts_that_pass_shellcheck(
    folder: Path, recipe: str, nodes: str
) -> None:
    task = yaml.safe_load(render(plan(folder, "sky", recipe, nodes)))
    assert set(task) <= SKY_KEYS
    assert set(task["resources"]) <= SKY_RESOURCES
    assert task["resources"]["accelerators"] == "H100:8"
    assert task["resources"]["job_recovery"] == {"max_restarts_on_errors": 3, "recover_on_exit_codes": [75]}
    assert task["secrets"] == {"AWS_SECRET_ACCESS_KEY": None, "RAY_AUTH_TOKEN": None}
    assert task["config"]["kubernetes"]["pod_config"]["spec"]["priorityClassName"] == "high"
    for script in ("setup", "run"):
        shellcheck("#!/bin/bash\n" + task[script])


@pytest.mark.parametrize("nodes", SIZES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_file_for_ray_up_is_valid_by_the_schema_inside_ray(folder: Path, recipe: str, nodes: str) -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    for changes in (
        {},
        {"provider": "gcp"},
        {"provider": "azure", "image": "registry/detr@sha256:0"},
        {"provider": "local", "head_host": "10.0.0.1", "hosts": tuple(f"10.0.0.{number}" for number in range(2, 10))},
    ):
        content = yaml.safe_load(render(plan(folder, "ray_up", recipe, nodes, **changes)))
        jsonschema.Draft7Validator(schema).validate(content)
        assert content["max_workers"] == 8
    content["max_wrkers"] = 8
    assert list(jsonschema.Draft7Validator(schema).iter_errors(content))


def test_the_operators_refusal_is_an_error_before_anything_is_sent(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.engines.kuberay.broken_rules", lambda _: ["it is wrong"])
    with pytest.raises(JobError, match="the operator would refuse this RayJob: it is wrong"):
        render(plan(folder, "kuberay"))


def test_dockerfile_is_clean_pinned_and_not_run_by_root() -> None:
    file = ROOT / "Dockerfile"
    done = subprocess.run([Path(sys.executable).with_name("hadolint"), file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    text = file.read_text()
    assert "--requirements requirements.lock" in text
    assert [line for line in text.splitlines() if line.startswith("USER ")][-1] == "USER 1000"
    assert "detr --help" in text


def test_a_smoke_run_is_named_as_its_command_names_it(folder: Path) -> None:
    (folder / "detr.toml").write_text(entry("slurm"))
    cluster = find_cluster("it")
    made = make_plan(cluster, read_request(cluster, ["train", "detr-r50-16gpu", "--smoke"]), CODE, "12ab34cd", "")
    assert made.run == "detr-r50-16gpu-12ab34cd-smoke"
    assert "--run detr-r50-16gpu-12ab34cd" in made.shown
    assert "--run detr-r50-16gpu-12ab34cd-smoke" not in made.shown


def test_a_name_that_no_launcher_takes_becomes_one(folder: Path) -> None:
    (folder / "detr.toml").write_text(entry("kuberay"))
    cluster = find_cluster("it")
    for run in ("My_Run.v2" + "x" * 100, "7", "+=_"):
        request = read_request(cluster, ["train", "detr-r50-16gpu", *WORDS, *(["--run", run] if run != "+=_" else [])])
        job = make_plan(cluster, request, CODE, "12ab34cd", "")
        assert broken_rules({"metadata": {"name": job.job}, "spec": {"clusterSelector": {"a": "b"}}}) == []
        assert job.job.endswith("-12ab34cd")
