"""Slurm: each job is a script for sbatch that starts a Ray cluster of its own on its nodes.

The script starts `ray start --block` with srun, in the job's step, so Slurm ends it with the job, and the driver in
the batch shell. A minute of warning before the time limit reaches the driver as SIGTERM; status 75 queues the job again.
"""

from __future__ import annotations

import shlex
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import ClassVar, TextIO

from jobs.clusters.entries import Slurm
from jobs.engines import client
from jobs.engines.engine import ENDED, Job, Say, State
from jobs.engines.shell import DRIVER, LINT, exports, secret_lines
from jobs.errors import JobError
from jobs.plan import STATUS_LATER, Plan

_STATES: dict[str, State] = {
    "COMPLETED": "SUCCEEDED",
    "CANCELLED": "STOPPED",
    "RUNNING": "RUNNING",
    "COMPLETING": "RUNNING",
    **dict.fromkeys(("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "RESIZING"), "PENDING"),
}  # all others are failures
_LOOK_S = 2.0
_COMMAND, _ENDED, _STOPPED = "command", "ended", "stopped"
"""Files in a job's folder: its command and run, the status that it ended with, and a note that it was stopped."""

_RAY = r"""
# Ray of this job alone, also where another job has processes on the same node: its port and the folder of each node come
# from the job's number, all other ports are free ones, and its token stays in a file that only its owner reads.
port=$((20000 + SLURM_JOB_ID % 5000))
read -r address _ < <(hostname -I)
export RAY_ADDRESS="$address:$port" RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$folder/token-$SLURM_JOB_ID"
(umask 077 && head -c 32 /dev/urandom | base64 >"$RAY_AUTH_TOKEN_PATH")
export DETR_PORT="$port" DETR_ADDRESS="$address" DETR_NODE_FOLDER="/tmp/detr-$UID-$SLURM_JOB_ID" SLURM_EXPORT_ENV=ALL

# The variables in single quotes are those of each node.
srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}" --cpu-bind=none \
  --kill-on-bad-exit=0 bash -c '
  if ! (umask 077 && mkdir -p "$DETR_NODE_FOLDER") || [ ! -O "$DETR_NODE_FOLDER" ]; then
    echo "detr: $DETR_NODE_FOLDER on $(hostname) belongs to another user; expected a folder of this job: remove it" >&2
    exit 1
  fi
  flags=(--num-cpus "${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}" --num-gpus "${SLURM_GPUS_ON_NODE:-0}"
    --temp-dir "$DETR_NODE_FOLDER/ray" --min-worker-port 0 --max-worker-port 0 --dashboard-agent-listen-port 0
    --disable-usage-stats --block)
  if [ "$SLURM_NODEID" = 0 ]; then
    exec "$0" start --head --node-ip-address "$DETR_ADDRESS" --port "$DETR_PORT" \
      --ray-client-server-port "$((DETR_PORT + 5000))" --include-dashboard false "${flags[@]}"
  fi
  until "$0" health-check --address "$RAY_ADDRESS" >/dev/null 2>&1; do sleep 2; done
  exec "$0" start --address "$RAY_ADDRESS" "${flags[@]}"' "$ray" &
nodes=$!
"""

_END = """
kill "$nodes" 2>/dev/null || true
wait "$nodes" || true
# After an error Ray's own logs stay on the nodes. Before the time limit nothing may delay the queueing: the limit would end
# the job first, and the same job finds its folders again.
if [ "$status" = 0 ] ||
  {{ [ "$status" = {later} ] && {{ [ "$warned" = 0 ] || [ -e "$folder/stopped" ]; }}; }}; then
  timeout 30 srun --ntasks-per-node=1 rm -rf "$DETR_NODE_FOLDER" || true
elif [ "$status" != {later} ]; then
  echo "Ray's logs are in $DETR_NODE_FOLDER on each node" >&2
fi
"""
_AGAIN = """\
# A stop comes from Slurm, at the time limit; without, the job is started again as often as its entry allows.
if [ "$status" = {later} ] && [ ! -e "$folder/stopped" ] &&
  {{ [ "$warned" = 1 ] || [ "${{SLURM_RESTART_COUNT:-0}}" -lt {retries} ]; }}; then
  echo "not done: the job queues again, and the same command continues the run"
  scontrol requeue "$SLURM_JOB_ID"
fi
"""


class SlurmEngine:
    """Client of sbatch, squeue, sacct and scancel."""

    suffix: ClassVar[str] = ".sh"

    def render(self, plan: Plan) -> str:
        """Return the script."""
        cluster = _slurm(plan)
        folder = _folder(cluster, plan.job)
        lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in _options(cluster, plan, folder))]
        lines += [
            LINT,
            "set -euo pipefail",
            f"folder={shlex.quote(str(folder))}",
            'mkdir -p "$folder"',
            f'rm -f "$folder/{_ENDED}"',
        ]
        lines += [*exports(plan.environment), *secret_lines(plan.secrets), *cluster.setup]
        if cluster.code == "snapshot":
            lines.append('export PYTHONPATH="$folder/code${PYTHONPATH:+:$PYTHONPATH}"')
        lines += plan.start
        lines += [f"python=$(command -v {shlex.quote(cluster.python)})", 'ray="$(dirname "$python")/ray"']
        words = shlex.join(plan.command[1:])
        again = _AGAIN.format(later=STATUS_LATER, retries=plan.retries) if plan.restarts else ""
        end = DRIVER + _END.format(later=STATUS_LATER) + again + f'echo "$status" >"$folder/{_ENDED}"\nexit "$status"\n'
        return "\n".join(lines) + "\n" + _RAY + f'\nset -- "$python" {words}\n' + end

    def by_hand(self, plan: Plan, file: str) -> list[str]:
        """Write the folder of the job, without which Slurm has nowhere to put its log, and return the command.

        Where only the cluster sees `job_folder`, making it there is the first command.
        """
        submit, folder = shlex.join(["sbatch", file]), _folder(_slurm(plan), plan.job)
        try:
            _write_folder(plan)
        except JobError:
            made = shlex.join(["mkdir", "-p", str(folder)])
            copied = f", then copy this checkout to {folder}/code" if plan.cluster.code == "snapshot" else ""
            return [f"{made}  # on the cluster{copied}", submit]
        return [submit]

    def submit(self, plan: Plan, say: Say) -> str:
        """Write script and snapshot into a folder of the job, which every node sees, and queue the script."""
        folder = _write_folder(plan)
        if plan.cluster.code == "snapshot":
            say(f"snapshot    {len(plan.code.files)} files, {plan.code.size / 1e6:.1f} MB, commit {plan.code.commit}")
        script = folder / f"job{self.suffix}"
        script.write_text(self.render(plan))
        number = client.run("sbatch", "--parsable", str(script)).strip().partition(";")[0]
        say(f"queued      as Slurm's job {number}; its folder is {folder}")
        return plan.job

    def status(self, cluster: Slurm, job: str) -> Job:
        """Return the job from the queue, else from Slurm's records."""
        found = [known for known in self.list(cluster) if known.id == job]
        if not found and (_folder(cluster, job) / _ENDED).exists():
            return _known(cluster, Job(job, _end(_folder(cluster, job))))
        if not found:
            raise JobError(f"there is no job {job!r} on {cluster.name}; see `detr jobs list --cluster {cluster.name}`")
        return found[0]

    def logs(self, cluster: Slurm, job: str, stream: TextIO, *, follow: bool = False) -> None:
        """Copy the log, which all starts of the job append to."""
        path = _folder(cluster, job) / "log"
        state = self.status(cluster, job).state
        if not path.exists() and not follow:
            raise JobError(f"job {job} has no log yet ({state}); expected {path}")
        position = 0
        while True:
            if path.exists():
                with path.open() as file:
                    file.seek(position)
                    stream.write(file.read())
                    stream.flush()
                    position = file.tell()
            if not follow or state in ENDED:
                break
            time.sleep(_LOOK_S)
            state = self.status(cluster, job).state
        if follow and state != "SUCCEEDED":
            raise JobError(f"job {job} ended as {state}; its log says why: {path}")

    def stop(self, cluster: Slurm, job: str) -> str:
        """Send SIGTERM to the batch shell, whose driver saves; without the note the script would queue the job again."""
        if self.status(cluster, job).state in ENDED:
            return f"{job} had already ended"
        (_folder(cluster, job) / _STOPPED).touch()
        if self.status(cluster, job).state == "PENDING":
            client.run("scancel", f"--name={job}")
            return f"{job} stopped before it ran"
        client.run("scancel", "--batch", "--signal=TERM", f"--name={job}")
        until = time.monotonic() + cluster.signal_s
        while time.monotonic() < until:
            if self.status(cluster, job).state in ENDED:
                return f"{job} stopped"
            time.sleep(_LOOK_S)
        client.run("scancel", f"--name={job}")
        return f"{job} killed: it did not stop within {cluster.signal_s} s"

    def list(self, cluster: Slurm) -> list[Job]:
        """Return the jobs whose folders exist, from queue and records, newest first."""
        waiting = client.run("squeue", "--me", "--noheader", "--format=%j|%T|%S|%r")
        found = {job.id: job for job in map(_job, waiting.splitlines())}
        try:
            ended = client.run(
                "sacct",
                "-X",
                "--noheader",
                "--parsable2",
                "--starttime=now-7days",
                "--format=JobName,State,Start,Reason",
            )
        except JobError:
            ended = ""  # not every Slurm keeps records
        for job in map(_job, ended.splitlines()):
            found.setdefault(job.id, job)
        mine = [_known(cluster, job) for job in found.values() if _folder(cluster, job.id).is_dir()]
        return sorted(mine, key=lambda job: job.started or 0, reverse=True)


def _write_folder(plan: Plan) -> Path:
    """Write the folder of a job, with its command and its snapshot, and return it."""
    cluster = _slurm(plan)
    folder = _folder(cluster, plan.job)
    try:
        folder.mkdir(parents=True)
        if cluster.code == "snapshot":
            plan.code.copy_to(folder / "code")
        (folder / _COMMAND).write_text(f"{plan.shown}\n{plan.run}\n")
    except OSError as error:
        raise JobError(
            f"job_folder {cluster.job_folder} cannot be written ({error.strerror}); expected a folder that every node sees"
        ) from None
    return folder


def _options(cluster: Slurm, plan: Plan, folder: Path) -> list[str]:
    nodes = cluster.nodes
    gpus = f"{nodes.accelerator}:{nodes.gpus}" if nodes.accelerator else str(nodes.gpus)
    options = {
        "job-name": plan.job,
        "nodes": f"{nodes.fewest or 1}-{nodes.most}" if nodes.elastic else str(nodes.most),
        "ntasks-per-node": "1",
        "cpus-per-task": str(nodes.cpus) if nodes.cpus else "",
        "gpus-per-node": gpus if nodes.gpus else "",
        "mem": f"{nodes.memory_gib}G" if nodes.memory_gib else "0",
        "time": _clock(cluster.time_limit_s) if cluster.time_limit else "",
        "partition": cluster.partition or cluster.queue,
        "account": cluster.account,
        "qos": cluster.qos or cluster.priority,
        "signal": f"B:TERM@{cluster.signal_s}",
        "open-mode": "append",
        "output": str(folder / "log"),
        "export": "NONE",
    }
    flags = ["--requeue" if plan.restarts else "--no-requeue", *(["--no-kill"] if nodes.elastic else [])]
    flags += [] if nodes.cpus else ["--exclusive"]
    return [*(f"--{name}={value}" for name, value in options.items() if value), *flags, *cluster.options]


def _clock(seconds: int) -> str:
    days, rest = divmod(seconds, 86400)
    return f"{days}-{rest // 3600:02}:{rest % 3600 // 60:02}:{rest % 60:02}"


def _folder(cluster: Slurm, job: str) -> Path:
    return (Path(cluster.job_folder).expanduser() / job).absolute()


def _known(cluster: Slurm, job: Job) -> Job:
    """Return the job with the command and the run that its folder keeps."""
    try:
        command, run = [*(_folder(cluster, job.id) / _COMMAND).read_text().split("\n"), ""][:2]
    except OSError:  # of an earlier release
        return job
    return replace(job, command=command, run=run)


def _end(folder: Path) -> State:
    """Return how a job ended that Slurm has forgotten, by its script."""
    if (folder / _STOPPED).exists():
        return "STOPPED"
    return "SUCCEEDED" if (folder / _ENDED).read_text().strip() == "0" else "FAILED"


def _job(line: str) -> Job:
    name, state, start, reason = [*line.split("|"), "", "", ""][:4]
    try:
        started = datetime.fromisoformat(start).timestamp()
    except ValueError:
        started = None
    words = state.split()
    return Job(
        name, _STATES.get(words[0] if words else "", "FAILED"), started, reason="" if reason == "None" else reason
    )


def _slurm(plan: Plan) -> Slurm:
    assert isinstance(plan.cluster, Slurm)
    return plan.cluster
