"""The files that engines write: valid by the launcher's own schema or by a lint, for every recipe of a cluster size."""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import ray
import ray.runtime_env
import yaml
from packaging.requirements import Requirement

from jobs.clusters import find_cluster
from jobs.plan import Request, make_plan
from jobs.refusals import read_request
from tests.support.entries import ELASTIC, entry
from tests.support.in_process import ROOT
from tests.support.plans import CODE, RECIPES, SIZES, WORDS, plan, render, shellcheck

SKY_KEYS = {
    "name", "workdir", "num_nodes", "resources", "envs", "secrets", "file_mounts", "setup", "run", "config", "service",
    "volumes", "experimental", "inputs", "outputs", "pool",
}  # fmt: skip
SKY_RESOURCES = {
    "infra", "accelerators", "accelerator_args", "cpus", "memory", "instance_type", "use_spot", "disk_size", "disk_tier",
    "network_tier", "ports", "image_id", "labels", "any_of", "ordered", "job_recovery", "autostop", "priority",
}  # fmt: skip


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
