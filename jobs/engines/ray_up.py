"""Ray's own launcher: `ray up` starts the machines of an entry once, and jobs go to their head.

The file of a cluster follows from its entry alone, so that `status`, `logs` and `stop` find it again.
"""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TextIO

from jobs.clusters.entries import RayUp
from jobs.code import ROOT
from jobs.engines import client
from jobs.engines.engine import Job, Say
from jobs.engines.shell import secret_lines
from jobs.engines.yaml_text import dump
from jobs.errors import JobError
from jobs.plan import GRACE_S, Plan

_CODE = "/tmp/detr-code"
_START_S = 3600.0
_API = "http://127.0.0.1:8265"
_TOKEN = "~/.ray/auth_token"
_WITH_TOKEN = "export RAY_AUTH_MODE=token"
_LIST = f"""
import json
from ray.job_submission import JobSubmissionClient
keys = "submission_id", "start_time", "message", "metadata", "entrypoint"
jobs = JobSubmissionClient("{_API}").list_jobs()
print(json.dumps([{{key: getattr(job, key) for key in keys}} | {{"status": job.status.value}} for job in jobs]))
"""


class RayUpEngine:
    """Client of `ray up` and `ray exec`."""

    suffix: ClassVar[str] = ".yaml"

    def render(self, plan: Plan) -> str:
        """Return the file of the cluster for `ray up`."""
        return dump(cluster_file(_ray_up(plan), plan.code.root))

    def by_hand(self, plan: Plan, file: str) -> list[str]:
        """Return the commands that start the machines, with the checkout as it is then, and submit the job on the head."""
        return [
            shlex.join(["ray", "up", "--yes", "--no-restart", file]),
            shlex.join(["ray", "exec", file, submission(plan)]),
        ]

    def submit(self, plan: Plan, say: Say) -> str:
        """Start the machines, if they do not run, and submit the job on the head."""
        cluster = _ray_up(plan)
        with tempfile.TemporaryDirectory(prefix="detr-snapshot-") as folder:
            if cluster.code == "snapshot":
                plan.code.copy_to(Path(folder))
                say(
                    f"snapshot    {len(plan.code.files)} files, {plan.code.size / 1e6:.1f} MB, commit {plan.code.commit}"
                )
            with _written(cluster, Path(folder)) as file:
                client.run("ray", "up", "--yes", "--no-restart", file, seconds=_START_S)
                client.run("ray", "exec", file, submission(plan), seconds=600)
        return plan.job

    def status(self, cluster: RayUp, job: str) -> Job:
        """Return the job as the head knows it."""
        found = [known for known in self.list(cluster) if known.id == job]
        if not found:
            raise JobError(f"there is no job {job!r} on {cluster.name}; see `detr jobs list --cluster {cluster.name}`")
        return found[0]

    def logs(self, cluster: RayUp, job: str, stream: TextIO, *, follow: bool = False) -> None:
        """Copy the driver's output."""
        flags = ["--follow"] if follow else []
        with _written(cluster, ROOT) as file:
            failed = client.stream(
                stream, "ray", "exec", file, _on_head("ray", "job", "logs", "--address", _API, *flags, job)
            )
        if failed:
            raise JobError(
                f"the log of {job} ends with an error; see `detr jobs status {job} --cluster {cluster.name}`"
            )

    def stop(self, cluster: RayUp, job: str) -> str:
        """Send SIGTERM; Ray kills what has not ended after a minute. The machines stay until `ray down`."""
        with _written(cluster, ROOT) as file:
            words = _on_head("ray", "job", "stop", "--address", _API, job)
            client.run("ray", "exec", file, words, seconds=GRACE_S + 60)
        return f"{job} stopped; the machines run until `ray down`"

    def list(self, cluster: RayUp) -> list[Job]:
        """Return the jobs that the head knows."""
        with _written(cluster, ROOT) as file:
            output = client.run("ray", "exec", file, _on_head(cluster.python, "-c", _LIST))
        listed = [line for line in output.splitlines() if line.startswith("[")]
        jobs = [_job(item) for item in json.loads(listed[-1])] if listed else []
        return sorted(jobs, key=lambda job: job.started or 0, reverse=True)


def submission(plan: Plan) -> str:
    """Return the command that submits the job on the head."""
    stop = {"RAY_JOB_STOP_SIGNAL": "SIGTERM", "RAY_JOB_STOP_WAIT_TIME_S": str(GRACE_S)}
    runtime: dict[str, Any] = {"env_vars": {**plan.environment, **stop}}
    if plan.cluster.code == "snapshot":
        runtime["working_dir"] = _CODE
    words = ["ray", "job", "submit", "--address", _API, "--no-wait", "--submission-id", plan.job]
    words += ["--runtime-env-json", json.dumps(runtime), "--metadata-json"]
    words += [json.dumps({"command": plan.shown, "run": plan.run}), "--", *plan.command]
    return _on_head(*words)


def _on_head(*words: str) -> str:
    return f"{_WITH_TOKEN}; {shlex.join(words)}"


def cluster_file(cluster: RayUp, code: Path) -> dict[str, Any]:
    """Return the content of the file for `ray up`."""
    nodes = cluster.nodes
    local = cluster.provider == "local"
    provider: dict[str, Any] = {"type": cluster.provider}
    if local:
        provider |= {"head_ip": cluster.head_host, "worker_ips": list(cluster.hosts)}
    elif cluster.region:
        provider["location" if cluster.provider == "azure" else "region"] = cluster.region
    secrets = secret_lines(cluster.references)
    start = f"{_WITH_TOKEN}; ulimit -n 65536; ray start --disable-usage-stats"
    head = f"{start} --head --port=6379 --num-cpus=0 --autoscaling-config=~/ray_bootstrap_config.yaml"
    worker = f"{start} --address=$RAY_HEAD_IP:6379"
    snapshot = cluster.code == "snapshot"
    setup = list(cluster.setup)
    if not setup and snapshot and not cluster.image:
        setup = [f"{shlex.quote(cluster.python)} -m pip install --quiet --requirement {_CODE}/requirements.lock"]
    content: dict[str, Any] = {
        "cluster_name": cluster.name.replace("_", "-"),
        "max_workers": nodes.most,
        "idle_timeout_minutes": 15,
        "provider": provider,
        "auth": {"ssh_user": cluster.ssh_user, **({"ssh_private_key": cluster.ssh_key} if cluster.ssh_key else {})},
        "file_mounts": {_TOKEN: cluster.token, **({_CODE: str(code)} if snapshot else {})},
        "rsync_filter": [".gitignore"],
        "rsync_exclude": ["**/.git", "**/.git/**"],
        "setup_commands": setup,
        "head_start_ray_commands": ["ray stop", "; ".join([*secrets, head])],
        "worker_start_ray_commands": ["ray stop", "; ".join([*secrets, worker])],
    }
    if cluster.image:
        content["docker"] = {
            "image": cluster.image,
            "container_name": "detr",
            "run_options": ["--ulimit nofile=65536:65536"],
        }
    if not local:
        content |= {"head_node_type": "head", "available_node_types": _node_types(cluster)}
    return content


def _node_types(cluster: RayUp) -> dict[str, Any]:
    nodes = cluster.nodes
    key = {"aws": "InstanceType", "gcp": "machineType", "azure": "azure_arm_parameters"}[cluster.provider]

    def machine(instance: str, spot: bool) -> dict[str, Any]:
        if cluster.provider == "azure":
            return {key: {"vmSize": instance, **({"priority": "Spot"} if spot else {})}}
        market: dict[str, Any] = {}
        if spot and cluster.provider == "aws":
            market = {"InstanceMarketOptions": {"MarketType": "spot"}}
        elif spot:
            market = {"scheduling": [{"preemptible": True}]}
        return {key: instance, **market}

    resources = {"CPU": nodes.cpus, "GPU": nodes.gpus}
    return {
        "head": {"resources": {"CPU": 0}, "node_config": machine(cluster.head.instance, False), "max_workers": 0},
        "worker": {
            "resources": {kind: count for kind, count in resources.items() if count},
            "node_config": machine(cluster.instance, nodes.spot),
            "min_workers": nodes.fewest,
            "max_workers": nodes.most,
        },
    }


@contextmanager
def _written(cluster: RayUp, code: Path) -> Iterator[str]:
    """Yield the path of the cluster's file."""
    with tempfile.TemporaryDirectory(prefix="detr-ray-up-") as folder:
        file = Path(folder) / "cluster.yaml"
        file.write_text(dump(cluster_file(cluster, code)))
        yield str(file)


def _job(item: dict[str, Any]) -> Job:
    metadata = item.get("metadata") or {}
    started = (item.get("start_time") or 0) / 1000 or None
    command = metadata.get("command", item.get("entrypoint", ""))
    name = str(item.get("submission_id") or "")
    return Job(
        name, item.get("status", "PENDING"), started, command, metadata.get("run", ""), item.get("message") or ""
    )


def _ray_up(plan: Plan) -> RayUp:
    assert isinstance(plan.cluster, RayUp)
    return plan.cluster
