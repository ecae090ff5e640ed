"""SkyPilot: each job is a managed job on machines that SkyPilot rents and replaces.

Status 75 starts the job again, without counting against the retries. Ray's processes of a job share a token that is
made when the job is submitted, and given to SkyPilot as a secret.
"""

from __future__ import annotations

import json
import secrets
import shlex
import tempfile
from pathlib import Path
from typing import Any, ClassVar, TextIO

from jobs.clusters.entries import Sky
from jobs.engines import client
from jobs.engines.engine import Job, Say, State
from jobs.engines.shell import DRIVER, LINT
from jobs.engines.yaml_text import dump
from jobs.errors import JobError
from jobs.plan import STATUS_LATER, Plan

_TOKEN = "RAY_AUTH_TOKEN"
_STATES: dict[str, State] = {
    "SUCCEEDED": "SUCCEEDED",
    "CANCELLED": "STOPPED",
    "RUNNING": "RUNNING",
    "CANCELLING": "RUNNING",
    "RECOVERING": "PENDING",
    "STARTING": "PENDING",
    "SUBMITTED": "PENDING",
    "PENDING": "PENDING",
}  # all others are failures
_UPLOAD_S = 1800.0

# SkyPilot has a Ray of its own at port 6380, so nothing here stops Ray machine-wide.
_RUN = """\
set -euo pipefail
{start}
python=$(command -v {python})
ray="$(dirname "$python")/ray"
head=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)
export RAY_ADDRESS="$head:6379" RAY_AUTH_MODE=token
flags=(--num-gpus "${{SKYPILOT_NUM_GPUS_PER_NODE:-0}}" --disable-usage-stats --block)
if [ "$SKYPILOT_NODE_RANK" != 0 ]; then
  until "$ray" health-check --address "$RAY_ADDRESS" >/dev/null 2>&1; do sleep 2; done
  # It ends when the head does, which is no failure of this node.
  "$ray" start --address "$RAY_ADDRESS" "${{flags[@]}}" || true
  exit 0
fi
"$ray" start --head --node-ip-address "$head" --port 6379 --include-dashboard false "${{flags[@]}}" &
nodes=$!
set -- "$python" {words}
"""
_END = """
kill "$nodes" 2>/dev/null || true
wait "$nodes" || true
exit "$status"
"""


class SkyEngine:
    """Client of `sky jobs`."""

    suffix: ClassVar[str] = ".yaml"

    def render(self, plan: Plan) -> str:
        """Return the task; its working folder is the checkout, of which `submit` sends the tracked files only."""
        return dump(task(plan, plan.code.root))

    def by_hand(self, plan: Plan, file: str) -> list[str]:
        """Return the commands that make the token and launch the job; the secrets are taken from the environment."""
        words = [word for name in (*plan.secrets, _TOKEN) for word in ("--secret", name)]
        renamed = [f'export {name}="${secret.where}"' for name, secret in plan.secrets.items() if name != secret.where]
        token = f"export {_TOKEN}=$(openssl rand -hex 32)"
        return [*renamed, token, shlex.join(["sky", "jobs", "launch", "--yes", "--detach-run", *words, file])]

    def submit(self, plan: Plan, say: Say) -> str:
        """Launch a managed job, with the secrets taken from this machine's environment."""
        cluster = _sky(plan)
        environment = {name: secret.value() for name, secret in plan.secrets.items()}
        environment.setdefault(_TOKEN, secrets.token_hex(32))
        with tempfile.TemporaryDirectory(prefix="detr-sky-") as folder:
            code = Path(folder) / "code"
            code.mkdir()
            if cluster.code == "snapshot":
                plan.code.copy_to(code)
                say(
                    f"snapshot    {len(plan.code.files)} files, {plan.code.size / 1e6:.1f} MB, commit {plan.code.commit}"
                )
            file = Path(folder) / "task.yaml"
            file.write_text(dump(task(plan, code)))
            words = [word for name in environment for word in ("--secret", name)]
            client.run(
                "sky", "jobs", "launch", "--yes", "--detach-run", *words, str(file),
                environment=environment, seconds=_UPLOAD_S,
            )  # fmt: skip
        return plan.job

    def status(self, cluster: Sky, job: str) -> Job:
        """Return the managed job."""
        found = [known for known in self.list(cluster) if known.id == job]
        if not found:
            raise JobError(f"there is no job {job!r} on {cluster.name}; see `detr jobs list --cluster {cluster.name}`")
        return found[0]

    def logs(self, cluster: Sky, job: str, stream: TextIO, *, follow: bool = False) -> None:
        """Copy the output of the job."""
        flags = [] if follow else ["--no-follow"]
        client.stream(stream, "sky", "jobs", "logs", "--name", job, *flags)
        final = self.status(cluster, job).state
        if follow and final != "SUCCEEDED":
            raise JobError(
                f"job {job} ended as {final}; its log says why: `detr jobs logs {job} --cluster {cluster.name}`"
            )

    def stop(self, cluster: Sky, job: str) -> str:
        """Cancel the job. SkyPilot ends its processes without a minute to save: the newest checkpoint is kept."""
        client.run("sky", "jobs", "cancel", "--yes", "--name", job, seconds=_UPLOAD_S)
        return f"{job} cancelled; the same command continues it at its newest checkpoint"

    def list(self, cluster: Sky) -> list[Job]:
        """Return the managed jobs of this user."""
        answer = json.loads(client.run("sky", "jobs", "queue", "--output", "json", seconds=120) or "[]")
        jobs = answer.get("jobs", []) if isinstance(answer, dict) else answer
        return sorted(map(_job, jobs), key=lambda job: job.started or 0, reverse=True)


def task(plan: Plan, workdir: Path) -> dict[str, Any]:
    """Return the task of SkyPilot."""
    cluster = _sky(plan)
    nodes, snapshot = cluster.nodes, cluster.code == "snapshot"
    accelerators = f"{nodes.accelerator}:{nodes.gpus}" if nodes.gpus else None
    resources = {
        "infra": cluster.infra,
        "accelerators": accelerators,
        "cpus": f"{nodes.cpus}+" if nodes.cpus else None,
        "memory": f"{nodes.memory_gib}+" if nodes.memory_gib else None,
        "use_spot": nodes.spot or None,
        "disk_size": cluster.disk_gib,
        "network_tier": "best" if nodes.most > 1 else None,
        "image_id": cluster.image,
        "job_recovery": {
            "max_restarts_on_errors": plan.retries,
            **({"recover_on_exit_codes": [STATUS_LATER]} if plan.restarts else {}),
        },
    }
    setup = list(cluster.setup)
    if not setup and snapshot:
        setup = [f"{shlex.quote(cluster.python)} -m pip install --quiet --requirement requirements.lock"]
    start = "\n".join(plan.start)
    path = 'export PYTHONPATH="$HOME/sky_workdir${PYTHONPATH:+:$PYTHONPATH}"\n' if snapshot else ""
    words = shlex.join(plan.command[1:])
    run = path + _RUN.format(python=shlex.quote(cluster.python), start=start, words=words) + DRIVER + _END
    config: dict[str, Any] = {}
    if cluster.priority and cluster.infra.startswith(("k8s", "kubernetes")):
        config = {"kubernetes": {"pod_config": {"spec": {"priorityClassName": cluster.priority}}}}
    content = {
        "name": plan.job,
        "workdir": str(workdir) if snapshot else None,
        "num_nodes": nodes.most,
        "resources": {key: value for key, value in resources.items() if value},
        "envs": dict(plan.environment),
        "secrets": {**dict.fromkeys(plan.secrets), _TOKEN: None},
        "file_mounts": {folder: {"source": url, "mode": "MOUNT"} for folder, url in cluster.mounts.items()},
        "setup": "\n".join([LINT, "set -e", *setup]) + "\n" if setup else None,
        "run": run,
        "config": config,
    }
    return {key: value for key, value in content.items() if value}


def _job(item: dict[str, Any]) -> Job:
    words = str(item.get("status", "")).rpartition(".")[2].upper()
    started = item.get("start_at") or item.get("submitted_at")
    reason = str(item.get("failure_reason") or "")
    return Job(str(item.get("job_name", "")), _STATES.get(words, "FAILED"), started and float(started), reason=reason)


def _sky(plan: Plan) -> Sky:
    assert isinstance(plan.cluster, Sky)
    return plan.cluster
