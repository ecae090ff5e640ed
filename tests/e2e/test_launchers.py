"""What engines hand to their launchers, run here: Slurm's script on stand-ins, and the entrypoint of a RayJob."""

import random
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from secrets import token_hex

import pytest
import yaml

from tests.support.command import TINY, Command, until
from tests.support.lost_hosts import Cluster, host_environment
from tests.support.recording import RECORDER, Recording
from tests.support.slurm import Slurm, reason_without_slurm
from tests.support.undisturbed import differences

pytestmark = pytest.mark.slow
STEPS = 60
SECRET = token_hex(16)  # the snapshot of a job holds this file
TRAIN = ["train", "overfit", *TINY, "--optim.max-steps", str(STEPS), "--evaluate.every", "10", "--cluster.workers", "2"]
TRAIN += ["--track.log-every", "1"]  # a point is the mean since the one before, or since the start


@pytest.fixture
def work(detr: Command, tmp_path: Path) -> Iterator[Command]:
    """The command in a folder of the test's own, with the store and absolute data of the module's."""
    shutil.copy(detr.folder / "mlflow.db", tmp_path)
    with Command(tmp_path) as command:
        command.env["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path}/mlflow.db"
        yield command


def data(detr: Command) -> list[str]:
    return ["--data.train", str(detr.folder / "data/train"), "--data.val", str(detr.folder / "data/val")]


def holds(folder: Path, secret: str) -> list[Path]:
    """The files below a folder that hold the secret."""
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_a_slurm_job_that_meets_its_time_limit_queues_again_until_the_run_is_done(
    detr: Command, work: Command, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if reason := reason_without_slurm():
        pytest.skip(reason)
    recording = Recording(tmp_path / "steps")
    recording.pace(0.5)
    files = tmp_path_factory.mktemp("secrets")
    (files / "aws").write_text(f"{SECRET}\n")
    login = work.env | {"PYTHONPATH": RECORDER, "DETR_RECORD": str(recording.folder), "LOGIN": SECRET}
    login.pop("MLFLOW_TRACKING_URI")
    slurm = Slurm(tmp_path_factory.mktemp("slurm"), login)
    work.env |= slurm.environment
    (tmp_path / "detr.toml").write_text(f"""
        [clusters.hpc]
        launcher = "slurm"
        nodes = {{count = 2, cpus = 1}}
        storage = "{tmp_path}/runs"
        job_folder = "{tmp_path}/jobs"
        mlflow = "sqlite:///{tmp_path}/mlflow.db"
        on_cluster = ["sqlite:///{tmp_path}"]
        time_limit = "10m"
        secrets = {{AWS_SECRET_ACCESS_KEY = "file:{files}/aws", MLFLOW_TRACKING_PASSWORD = "env:LOGIN"}}
        """)
    chance = random.Random()
    try:
        output = work("submit", "hpc", "--", *TRAIN, *data(detr), "--run", "queued")
        job = next(line.split()[1] for line in output.splitlines() if line.startswith("submitted"))
        log = tmp_path / "jobs" / job / "log"
        for number in (1, 2):
            # Only the steps of this start: before it has any, the job's script is not ready for a warning.
            step = recording.last()[0] + chance.randrange(4, 12)
            print(f"time limit {number} at step {step}")
            until(lambda step=step: recording.last()[0] >= step or ended(slurm), f"step {step}")  # type: ignore[misc]
            assert not ended(slurm), log.read_text()
            recording.pace(2)  # so that the run does not end before the warning comes
            slurm.warn(job)
            until(lambda number=number: slurm.jobs()[0]["starts"] > number or ended(slurm), "another start")  # type: ignore[misc]
            assert not ended(slurm), log.read_text()
            recording.pace(0.5)
        recording.pace(0)
        until(lambda: ended(slurm), "the end")
    finally:
        slurm.stop()
    (known,) = slurm.jobs()
    assert (known["state"], known["starts"]) == ("COMPLETED", 3), log.read_text()
    assert log.read_text().count("the job queues again") == 2
    assert "SUCCEEDED" in work("jobs", "status", job, "--cluster", "hpc")
    assert {line.ranks for line in recording.lines()} == {2}
    assert (tmp_path / "jobs" / job / "code" / "jobs" / "cli.py").exists()
    assert differences(tmp_path / "runs" / "queued", tmp_path / "mlflow.db", tmp_path / "undisturbed")[0] == []
    assert not holds(tmp_path, SECRET) + holds(slurm.folder / "bin", SECRET)


def ended(slurm: Slurm) -> bool:
    return slurm.jobs()[0]["state"] not in ("PENDING", "RUNNING")


def test_the_entrypoint_of_a_rayjob_is_the_same_run_on_a_cluster_of_every_retry(
    detr: Command, work: Command, tmp_path: Path
) -> None:
    """KubeRay starts a fresh Ray cluster for each retry and gives it the same entrypoint."""
    (tmp_path / "detr.toml").write_text(f"""
        [clusters.k8s]
        launcher = "kuberay"
        image = "registry/detr@sha256:0123"
        nodes = {{count = 2, cpus = 1, memory_gib = 4}}
        storage = "{tmp_path}/runs"
        volumes = {{everything = "/"}}
        mlflow = "sqlite:///{tmp_path}/mlflow.db"
        on_cluster = ["sqlite:///{tmp_path}"]
        secrets = {{AWS_SECRET_ACCESS_KEY = "secret:aws/key"}}
        """)
    manifest = work("submit", "k8s", "--write", "-", "--", *TRAIN, *data(detr))
    job = yaml.safe_load(manifest[manifest.index("apiVersion") :])
    words = shlex.split(job["spec"]["entrypoint"])
    run = words[words.index("--run") + 1]
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    variables = {variable["name"]: variable["value"] for variable in head["env"] if "value" in variable}
    recording = Recording(tmp_path / "steps")
    recording.pace(0.5)  # so that the run does not end while this process waits
    (tmp_path / "token").write_text("a-token-of-this-test-alone-0123456789abcdef")
    environment = work.env | recording.environment | variables
    environment |= {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"), "RAY_AUTH_MODE": "token"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    killed_at = random.Random().randrange(5, STEPS - 20)
    print(f"killed at step {killed_at}")
    for attempt in ("first", "retry"):
        folder = tmp_path / attempt
        folder.mkdir()
        cluster = Cluster(folder, environment)
        cluster.start()
        try:
            own = host_environment(folder / "driver", environment) | {"RAY_ADDRESS": cluster.address}
            with (folder / "log").open("w") as log:
                entrypoint = job["spec"]["entrypoint"]
                driver = subprocess.Popen(entrypoint, shell=True, cwd=folder, env=own, stdout=log, stderr=log)
            if attempt == "first":
                until(lambda driver=driver: recording.last()[0] >= killed_at or driver.poll() is not None, "it")  # type: ignore[misc]
                assert driver.poll() is None, (folder / "log").read_text()
                driver.kill()
            assert (driver.wait(timeout=600) == 0) is (attempt == "retry"), (folder / "log").read_text()
        finally:
            cluster.lose_all()
        recording.pace(0)
    assert run.startswith("overfit-")
    assert differences(tmp_path / "runs" / run, tmp_path / "mlflow.db", tmp_path / "undisturbed")[0] == []
