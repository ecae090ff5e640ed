"""The file of clusters: what it may say, and how each mistake is named."""

import time
from pathlib import Path

import pytest

from jobs.clusters import Ray, Slurm, find_cluster, read_clusters
from jobs.clusters.secret import Secret
from jobs.engines.slurm import SlurmEngine
from jobs.plan import Plan
from tests.support.entries import ELASTIC, ENTRIES, FIXED, entry
from tests.support.in_process import Detr

RAY = '[clusters.lab]\nlauncher = "ray"\naddress = "http://head:8265"\n'
SLURM = '[clusters.hpc]\nlauncher = "slurm"\nnodes = {count = 2, gpus = 8}\n'
KUBERAY = '[clusters.k8s]\nlauncher = "kuberay"\nimage = "a"\nnodes = {count = 1, cpus = 8, memory_gib = 8}\n'
HIDDEN = "wJalrXUtnFEMI"


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty home, and a working folder without a file."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.mark.parametrize("nodes", [FIXED, ELASTIC])
@pytest.mark.parametrize("launcher", ENTRIES)
def test_an_entry_of_every_launcher_is_read(tmp_path: Path, launcher: str, nodes: str) -> None:
    (tmp_path / "detr.toml").write_text(entry(launcher, nodes))
    found = find_cluster("it")
    assert (found.name, found.launcher) == ("it", launcher)
    assert found.time_limit_s == (60 * 3600 if launcher in ("slurm", "kuberay") else 0)
    assert found.nodes is not None
    assert (found.nodes.fewest, found.nodes.most) == ((8, 8) if nodes == FIXED else (1, 8))
    assert found.environment["NOTE"] == "it's a $test"
    assert set(found.references) >= {"AWS_SECRET_ACCESS_KEY"}


def test_the_working_folder_comes_before_the_home(tmp_path: Path, home: Path) -> None:
    (home / ".config" / "detr").mkdir(parents=True)
    (home / ".config" / "detr" / "clusters.toml").write_text(RAY + SLURM)
    (tmp_path / "detr.toml").write_text(RAY.replace("head", "other"))
    assert list(read_clusters()) == ["local", "lab", "hpc"]
    lab, hpc = find_cluster("lab"), find_cluster("hpc")
    assert isinstance(lab, Ray)
    assert isinstance(hpc, Slurm)
    assert lab.address == "http://other:8265"


def test_what_only_the_cluster_sees_is_known_by_its_folder() -> None:
    lab = Ray(address="http://head:8265", on_cluster=("/data/", "s3://bucket"))
    assert [lab.sees_alone(url) for url in ("/data", "/data/coco", "/database", "s3://bucket/a", "s3://buckets")] == [
        True, True, False, True, False
    ]  # fmt: skip


def test_a_path_and_a_switch_are_no_secrets() -> None:
    shown = {"GOOGLE_APPLICATION_CREDENTIALS": "/shared/key.json", "TOKENIZERS_PARALLELISM": "false"}
    assert Ray(address="http://head:8265", environment=shown).environment == shown


def test_secrets_are_references() -> None:
    k8s = Ray(address="http://head:8265", secrets={"A_TOKEN": "env:A_TOKEN"})
    assert k8s.references == {"A_TOKEN": Secret("env", "A_TOKEN")}


MISTAKES = [
    (RAY.replace("address", "adress"), "clusters.lab: there is no key adress; did you mean address?"),
    (RAY.replace('"ray"', '"rey"'), "launcher is 'rey'; expected one of ray, kuberay, slurm, sky, ray_up: did you mean ray?"),
    (RAY.replace('launcher = "ray"\n', ""), "clusters.lab: has no launcher; expected one of ray,"),
    (RAY.replace('address = "http://head:8265"', ""), "clusters.lab: has no key `address`"),
    (RAY.replace("http://head:8265", "head:8265"), "address is 'head:8265'; expected the URL of the job server"),
    (RAY + 'python = "~/venv/bin/python"\n', "python is '~/venv/bin/python'; expected it without ~"),
    (RAY + 'retries = "3"\n', "clusters.lab: retries: expected `int`, got `str`"),
    (RAY + 'code = "snapshots"\n', "code: invalid enum value 'snapshots'; expected snapshot or installed"),
    (RAY + f'environment = {{AWS_SECRET_ACCESS_KEY = "{HIDDEN}"}}\n', "environment.AWS_SECRET_ACCESS_KEY would show a secret"),
    (RAY + f'secrets = {{AWS_SECRET_ACCESS_KEY = "{HIDDEN}"}}\n', "secrets.AWS_SECRET_ACCESS_KEY is not a reference to a secret"),
    (RAY + f'mlflow = "http://ada:{HIDDEN}@tracking"\n', "mlflow holds a user name or password"),
    (RAY + 'secrets = {A_TOKEN = "secret:a/b"}\n', "secrets.A_TOKEN is secret:...; expected env with ray"),
    (RAY + 'queue = "fast"\n', "queue means nothing to ray; expected no such key"),
    (SLURM + 'time_limit = "36 hours"\n', "time_limit is '36 hours'; expected numbers with d, h, m or s"),
    (SLURM.replace("gpus", "gpu"), "there is no key nodes.gpu; did you mean nodes.gpus?"),
    (SLURM.replace("count = 2", "min = 3, max = 2"), "nodes: nodes.min is 3 and nodes.max is 2; expected min <= max"),
    (SLURM.replace("count = 2, ", ""), "nodes has neither count nor max"),
    (SLURM.replace("count = 2", "count = 2.5"), "nodes.count: expected `int`, got `float`"),
    (SLURM + 'time_limit = "5m"\n', "time_limit is 5m; expected more than signal_s, 300 s"),
    (SLURM + "signal_s = 60\n", "signal_s is 60; expected at least 120"),
    (SLURM + 'partition = "gpu queue"\n', "partition is 'gpu queue'; expected no blanks"),
    (KUBERAY.replace(", memory_gib = 8", ""), "nodes needs cpus and memory_gib with kuberay"),
    (KUBERAY + "grace_s = 30\n", "grace_s is 30; expected at least 120"),
    (KUBERAY + 'queue = "team"\n', "queue without scheduler"),
    (KUBERAY + 'code = "snapshot"\n', "code: invalid enum value 'snapshot'"),
    (RAY + "[clusters.lab]\n", "is not TOML"),
    (RAY.replace("clusters.lab", "cluster.lab"), "has 'cluster' at the top; expected only [clusters.NAME]"),
    (RAY.replace("clusters.lab", "clusters.local"), "clusters.local: is always this machine's own Ray cluster"),
    (RAY.replace("clusters.lab", 'clusters."My Lab"'), "clusters.My Lab: is no name of a cluster"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line"), MISTAKES, ids=[line[:40] for _, line in MISTAKES])
def test_a_mistake_in_the_file_is_named_in_a_line(detr: Detr, tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "detr.toml").write_text(text)
    start = time.process_time()
    result = detr("clusters")
    print(f"{time.process_time() - start:.3f} CPU s: {result.err.strip()}")
    assert result.status == 1
    assert line in result.line
    assert str(tmp_path / "detr.toml") in result.line
    assert HIDDEN not in result.line


def test_clusters_lists_every_entry(detr: Detr, tmp_path: Path) -> None:
    (tmp_path / "detr.toml").write_text(RAY + SLURM)
    result = detr("clusters")
    assert (result.status, result.err) == (0, "")
    assert [line.split()[:2] for line in result.out.splitlines()[2:]] == [
        ["local", "ray"],
        ["lab", "ray"],
        ["hpc", "slurm"],
    ]
    assert "http://head:8265" in result.out
    assert "2 x 8 GPUs" in result.out


def test_an_unknown_cluster_is_named_with_the_nearest(detr: Detr, tmp_path: Path) -> None:
    (tmp_path / "detr.toml").write_text(RAY + SLURM)
    result = detr("submit", "labb", "--", "train", "demo")
    assert "there is no cluster 'labb'; did you mean lab?" in result.line


def test_check_sends_the_probe_of_a_training_and_follows_it(
    detr: Detr, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Plan] = []
    followed: list[str] = []
    monkeypatch.setattr(SlurmEngine, "submit", lambda _, plan, say: sent.append(plan) or plan.job)
    monkeypatch.setattr(SlurmEngine, "logs", lambda _, cluster, job, stream, *, follow: followed.append(job))
    storage = (
        f'storage = "{tmp_path}/runs"\nmlflow = "https://mlflow.example"\non_cluster = ["https://mlflow.example"]\n'
    )
    (tmp_path / "detr.toml").write_text(SLURM + storage)
    assert detr("clusters", "check", "hpc").status == 0
    assert detr("clusters", "check", "hpc", "--", "train", "demo", "--seed", "7").status == 0
    assert "16 --optim.batch-size 64 --cluster.gpu yes" in sent[0].shown  # a worker for each of 2 x 8 GPUs
    assert sent[1].shown == f"detr clusters probe demo --seed 7 --storage {tmp_path}/runs"
    assert followed == [plan.job for plan in sent]
    assert "expected `detr clusters check hpc -- train RECIPE ...`" in detr("clusters", "check", "hpc", "--", "ui").line


def test_a_check_that_is_interrupted_stops_its_job(detr: Detr, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[str] = []

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SlurmEngine, "submit", lambda _, plan, say: plan.job)
    monkeypatch.setattr(SlurmEngine, "logs", interrupted)
    monkeypatch.setattr(SlurmEngine, "stop", lambda _, cluster, job: stopped.append(job) or "")
    common = 'mlflow = "https://mlflow.example"\non_cluster = ["https://mlflow.example"]\n'
    (tmp_path / "detr.toml").write_text(SLURM + f'storage = "{tmp_path}/runs"\n{common}')
    result = detr("clusters", "check", "hpc")
    assert result.status == 130
    assert [f"submitted   {job} to hpc (slurm)" for job in stopped] == result.out.splitlines()
    assert len(stopped) == 1
