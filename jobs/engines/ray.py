"""Ray Jobs: a running Ray cluster with a job server."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TextIO, TypeVar

from jobs.clusters.entries import Ray
from jobs.clusters.file import LOCAL, is_loopback
from jobs.clusters.secret import parse_secret
from jobs.engines.engine import ENDED, Job, Say
from jobs.engines.shell import secret_lines
from jobs.errors import JobError
from jobs.plan import GRACE_S, Plan
from shards.errors import one_line

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

Answer = TypeVar("Answer")
_ANSWER_S = 8.0
_INSTALL_S = 3600
_UPLOAD_S = 120.0
_NO_AGENT = "No available agent"
_TRIES, _AGAIN_S = 30, 2.0
# A stopped job has a minute to save a checkpoint; Ray's default kills it after three seconds.
_STOP = {"RAY_JOB_STOP_SIGNAL": "SIGTERM", "RAY_JOB_STOP_WAIT_TIME_S": str(GRACE_S)}


class RayEngine:
    """Client of Ray's job server."""

    suffix: ClassVar[str] = ".json"

    def render(self, plan: Plan) -> str:
        """Return the request of the job as JSON; `working_dir` is added when the snapshot is uploaded."""
        return json.dumps(request_of(plan), indent=2) + "\n"

    def by_hand(self, plan: Plan, file: str) -> list[str]:
        """Return nothing: a program has to upload the snapshot and send the request."""
        return []

    def submit(self, plan: Plan, say: Say) -> str:
        """Upload the snapshot, if there is one, and start the job."""
        cluster, request = _ray(plan), request_of(plan)
        client = connect(cluster)
        with tempfile.TemporaryDirectory(prefix="detr-snapshot-") as folder:
            if cluster.code == "snapshot":
                plan.code.copy_to(Path(folder))
                request["runtime_env"]["working_dir"] = folder
                say(
                    f"snapshot    {len(plan.code.files)} files, {plan.code.size / 1e6:.1f} MB, commit {plan.code.commit}"
                )
            return str(_accepted(cluster, lambda: client.submit_job(**request), say))

    def status(self, cluster: Ray, job: str) -> Job:
        """Return the job as the server knows it."""
        client = connect(cluster)
        try:
            return _job(_within(_ANSWER_S, cluster, lambda: client.get_job_info(job)))
        except RuntimeError:
            raise JobError(f"there is no job {job!r} on {cluster.address}; see `detr jobs list`") from None

    def logs(self, cluster: Ray, job: str, stream: TextIO, *, follow: bool = False) -> None:
        """Copy the driver's output."""
        self.status(cluster, job)
        client = connect(cluster)
        if not follow:
            stream.write(str(client.get_job_logs(job)))
            return

        async def copy() -> None:
            async for lines in client.tail_job_logs(job):
                stream.write(lines)
                stream.flush()

        asyncio.run(copy())
        final = self.status(cluster, job).state
        if final != "SUCCEEDED":
            raise JobError(f"job {job} ended as {final}; its log says why: `detr jobs logs {job}`")

    def stop(self, cluster: Ray, job: str, *, wait_s: float = GRACE_S + 15) -> str:
        """Send SIGTERM and wait; Ray kills what has not ended after a minute."""
        if self.status(cluster, job).state in ENDED:
            return f"{job} had already ended"
        connect(cluster).stop_job(job)
        start = time.monotonic()
        while time.monotonic() < start + wait_s:
            final = self.status(cluster, job).state
            if final == "STOPPED" and time.monotonic() > start + GRACE_S:
                return f"{job} killed: it did not stop within {GRACE_S} s"  # Ray calls that stopped, too
            if final in ENDED:
                return f"{job} {final.lower()}"
            time.sleep(1)
        raise JobError(f"job {job} did not end within {wait_s:.0f} s; see `detr jobs logs {job}`")

    def list(self, cluster: Ray) -> list[Job]:
        """Return the submitted jobs."""
        client = connect(cluster)
        known = _within(_ANSWER_S, cluster, client.list_jobs)
        jobs = [_job(details) for details in known if details.submission_id]
        return sorted(jobs, key=lambda job: job.started or 0, reverse=True)


def request_of(plan: Plan) -> dict[str, Any]:
    """Return the arguments of `submit_job`, without the snapshot."""
    cluster = _ray(plan)
    runtime: dict[str, Any] = {"env_vars": {**plan.environment, **_STOP}}
    if cluster.requirements == "lock" and cluster.code == "snapshot":
        runtime["pip"] = {"packages": _locked(plan.code.root), "pip_check": False}
        runtime["config"] = {"setup_timeout_seconds": _INSTALL_S}  # Ray's 10 minutes can be too few for all of them
    request: dict[str, Any] = {
        "entrypoint": "; ".join([*secret_lines(plan.secrets), plan.shell]),
        "submission_id": plan.job,
        "runtime_env": runtime,
        "metadata": {"command": plan.shown, "run": plan.run, "commit": plan.environment.get("DETR_COMMIT", "")},
    }
    if cluster.driver_cpus:
        request["entrypoint_num_cpus"] = cluster.driver_cpus
    if cluster.driver_resources:
        request["entrypoint_resources"] = cluster.driver_resources
    if cluster.driver_labels:
        request["entrypoint_label_selector"] = cluster.driver_labels
    return request


def _locked(root: Path) -> list[str]:
    """Return the pinned libraries."""
    lines = (root / "requirements.lock").read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def _ray(plan: Plan) -> Ray:
    assert isinstance(plan.cluster, Ray)
    return plan.cluster


def _job(details: JobDetails) -> Job:
    metadata = details.metadata or {}
    return Job(
        str(details.submission_id),
        str(details.status.value),  # type: ignore[arg-type]
        (details.start_time or 0) / 1000 or None,
        metadata.get("command", details.entrypoint),
        metadata.get("run", ""),
        one_line(RuntimeError(details.message)) if details.message else "",
    )


def sizes_of_nodes(cluster: Ray) -> list[tuple[float, float]] | None:
    """Return CPUs and GPUs of each live node, None if the server does not say. Ray is not imported.

    Raise `JobError` if no server answers.
    """
    query = "/api/v0/nodes?detail=1&limit=10000&filter_keys=state&filter_predicates=%3D&filter_values=ALIVE"
    _ask(cluster, "/api/version")
    try:
        nodes = json.loads(_ask(cluster, query))["data"]["result"]["result"]
    except (JobError, KeyError, ValueError):
        return None
    return [(node["resources_total"].get("CPU", 0), node["resources_total"].get("GPU", 0)) for node in nodes]


def connect(cluster: Ray) -> JobSubmissionClient:
    """Return a client of the job server; raise `JobError` if it does not answer or refuses the token."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray prefers this variable to the address that its client is given, so both must be the same.
    os.environ["RAY_API_SERVER_ADDRESS"] = cluster.address
    _ask(cluster, "/api/version")
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return _within(_ANSWER_S, cluster, lambda: JobSubmissionClient(cluster.address, headers=_headers(cluster)))
    except AuthenticationError:
        raise _refused(cluster) from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _unanswered(cluster, one_line(error)) from None


def _ask(cluster: Ray, path: str) -> bytes:
    """Return the server's answer without importing Ray; raise `JobError` if it is silent or refuses."""
    request = urllib.request.Request(cluster.address.rstrip("/") + path)
    for name, value in _headers(cluster).items():
        request.add_unredirected_header(name, value)  # another server gets no token

    def ask() -> bytes:
        with urllib.request.urlopen(request, timeout=_ANSWER_S) as answer:
            return bytes(answer.read())

    try:
        return _within(_ANSWER_S, cluster, ask)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (401, 403):
            raise _refused(cluster) from None
        raise _unanswered(cluster, f"HTTP {error.code}") from None
    except (OSError, ValueError) as error:
        raise _unanswered(cluster, one_line(getattr(error, "reason", None) or error)) from None


def _headers(cluster: Ray) -> dict[str, str]:
    """Return the header with the token of the entry; for `local` on the loopback interface, with this machine's.

    Without a token the header is empty, so that Ray's client does not send this machine's to another cluster.
    """
    token = ""
    if cluster.token:
        token = parse_secret(cluster.token, "token").value()
    elif cluster.name == LOCAL and is_loopback(cluster.address) and os.environ.get("RAY_AUTH_MODE", "token") == "token":
        path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
        token = os.environ.get("RAY_AUTH_TOKEN") or (path.read_text().strip() if path.is_file() else "")
    return {"Authorization": f"Bearer {token}" if token else ""}


def _refused(cluster: Ray) -> JobError:
    return JobError(
        f"the Ray cluster at {cluster.address} refused {'the token of the entry' if cluster.token else 'the request'}; "
        "expected the cluster's token: give `token` in the entry, or for `local` at 127.0.0.1 ~/.ray/auth_token or "
        "RAY_AUTH_TOKEN_PATH"
    )


def _unanswered(cluster: Ray, reason: str) -> JobError:
    return JobError(
        f"no Ray job server answers at {cluster.address} ({reason}); expected a running cluster: start one with "
        "`ray start --head`, or correct the address"
    )


def _accepted(cluster: Ray, call: Callable[[], Answer], say: Say) -> Answer:
    """Return what `call` returns; a head that has just started answers before the agent that starts its jobs does."""
    for tried in range(_TRIES):
        try:
            return _within(_UPLOAD_S, cluster, call)
        except RuntimeError as error:
            if _NO_AGENT not in str(error):
                raise JobError(f"{cluster.address} refused the job ({one_line(error)})") from None
        if tried == 0:
            say(f"waiting for {cluster.address}, which cannot start jobs yet")
        time.sleep(_AGAIN_S)
    raise JobError(f"{cluster.address} cannot start jobs yet ({_NO_AGENT}); try again in a minute")


def _within(seconds: float, cluster: Ray, call: Callable[[], Answer]) -> Answer:
    """Return what `call` returns; raise `JobError` if that takes too long, since Ray's client waits for ever."""
    answers: list[Answer] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise _unanswered(cluster, f"silent for {seconds:g} s")
    if errors:
        raise errors[0]
    return answers[0]
