"""Commands that would fail on a cluster are refused here, each in a line, and nothing is sent."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from jobs.clusters import find_cluster
from jobs.engines import ray as ray_engine
from jobs.refusals import warnings_of
from tests.support.in_process import ROOT, Detr
from tests.support.job_server import JobServer, job_server

DATA = "--data.train {data}/train --data.val {data}/val"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JobServer]:
    """The Ray cluster `local` with two nodes of 8 CPUs."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    with job_server() as made:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", made.url)
        yield made


@pytest.fixture
def site(
    server: JobServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_data: SimpleNamespace
) -> SimpleNamespace:
    """Entries for every launcher, and the data, storage and MLflow that they use."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush-hush")
    common = f'storage = "{tmp_path}/runs"\nmlflow = "{server.url}"\non_cluster = ["{server.url}", "/only/there"]\n'
    (tmp_path / "detr.toml").write_text(f"""
[clusters.lab]
launcher = "ray"
address = "{server.url}"
token = "env:LAB_TOKEN"
{common}
[clusters.small]
launcher = "slurm"
nodes = {{count = 2, cpus = 4}}
{common}
[clusters.gpus]
launcher = "slurm"
nodes = {{min = 1, max = 2, gpus = 4, cpus = 16}}
{common}
[clusters.k8s]
launcher = "kuberay"
image = "image@sha256:0"
nodes = {{count = 2, cpus = 4, memory_gib = 8}}
volumes = {{data = "/data"}}
storage = "s3://bucket/runs"
mlflow = "https://tracking"
on_cluster = ["https://tracking", "s3://bucket"]
[clusters.url]
launcher = "slurm"
nodes = {{count = 2, cpus = 4}}
storage = "s3://ada:hush-hush-hush@bucket/runs"
mlflow = "{server.url}"
on_cluster = ["{server.url}", "s3://ada:hush-hush-hush@bucket"]
[clusters.lines]
launcher = "slurm"
nodes = {{count = 2, cpus = 4}}
code = "installed"
setup = ["export KEY=hush-hush-hush"]
{common}
[clusters.dead]
launcher = "slurm"
nodes = {{count = 2, cpus = 4}}
storage = "{tmp_path}/runs"
mlflow = "http://127.0.0.1:9"
[clusters.file]
launcher = "slurm"
nodes = {{count = 2, cpus = 4}}
storage = "{tmp_path}/runs"
[clusters.folder]
launcher = "ray"
address = "{server.url}"
code = "installed"
directory = "/no/such/folder"
[clusters.python]
launcher = "ray"
address = "{server.url}"
code = "installed"
python = "/no/such/python"
""")
    return SimpleNamespace(server=server, data=tiny_data.root, folder=tmp_path)


REFUSED = [
    # what cannot be a job, and what is no command
    ("local -- submit local -- train demo", "`detr submit` runs on this machine, not as a job"),
    ("local -- ui", "`detr ui` runs on this machine"),
    ("local -- jobs list", "`detr jobs` runs on this machine"),
    ("local -- tarin demo", "there is no command 'tarin' to submit; did you mean train?"),
    ("local train demo", "got 'train' without -- before it; expected `detr submit local -- train ...`"),
    ("local --", "nothing to run after --"),
    ("local -- train demo --help", "`train --help` needs no cluster"),
    ("local -- train detr-r5", "there is no recipe 'detr-r5'; did you mean detr-r50?"),
    ("local -- train demo --optim.lrr 1", "did you mean --optim.lr"),
    ("local -- shard coc --out o", "got 'coc' after `detr shard`"),
    ("local -- sweep lr demo --optim.lrr 1,2", "--optim.lrr"),
    ("small -- sweep lr overfit --seed 1,2 --data.train /absent --data.val /absent", "if only small sees it, name its folder"),
    # secrets and tokens
    ("local -- train demo --track.experiment hush-hush-hush", "the command holds the value of AWS_SECRET_ACCESS_KEY"),
    ("url -- train demo", "the s3:// address holds a password"),
    ("lines -- train demo", "the job's file, by the entry lines, holds the value of AWS_SECRET_ACCESS_KEY"),
    ("lab --address http://127.0.0.1:9 -- train demo", "the token of lab belongs to http://127.0.0.1:"),
    ("small --address http://127.0.0.1:9 -- train demo", "--address is for Ray clusters, and small is slurm"),
    # numbers
    ("local -- train demo --cluster.workers 16 --cluster.cpus-per-worker 4", "16 workers of 4 CPUs do not fit local: its nodes (2 of 8 CPUs) hold 4"),
    ("local -- train demo --cluster.gpu yes", "the workers need a GPU each, and no node of local has one"),
    ("small -- train demo --cluster.workers 8 --cluster.cpus-per-worker 2", "8 workers of 2 CPUs do not fit small: at most 2 nodes of 4 CPUs hold 4"),
    ("small -- train demo --cluster.gpu yes", "the workers need a GPU each, and the nodes of small have none"),
    ("gpus -- train detr-r50-16gpu " + DATA, "16 workers of 4 CPUs and a GPU do not fit gpus: at most 2 nodes of 4 GPUs and 16 CPUs hold 8"),
    ("small -- sweep lr demo --seed 1,2 --cluster.workers 8 --cluster.cpus-per-worker 2", "8 workers of 2 CPUs do not fit small"),
    # places
    ("local -- train overfit --data.train absent --data.val absent", "no manifest.json here"),
    ("small -- train overfit --data.train data/train --data.val data/val", "--data.train data/train is a relative folder"),
    ("small -- train overfit --data.train /absent/train --data.val /absent/val", "if only small sees it, name its folder in `on_cluster`"),
    ("local -- train demo --storage {file}/runs", "is a file; expected a folder that every worker may write"),
    ("local -- train demo --storage s4://bucket/runs", "no store is called s4://; expected a folder or a URL"),
    ("small -- train demo --storage runs", "--storage runs is a relative folder"),
    ("k8s -- train overfit " + DATA, "is on no volume of k8s (its volumes: /data)"),
    ("folder -- train demo", "directory /no/such/folder of folder is no folder"),
    ("python -- train demo", "python /no/such/python of python is no program"),
    ("local -- train finetune", "finetune needs --initial"),
    ("local -- shard coco --images absent --annotations a.json --out o", "absent: nothing is there"),
    ("local -- shard coco-panoptic --images . --annotations . --segments absent --out o", "absent: nothing is there"),
    ("local -- evaluate models:/detr@best --data absent", "absent: nothing is there"),
    # MLflow
    ("dead -- train demo", "MLflow at http://127.0.0.1:9 is this machine's own server, which dead does not reach"),
    ("file -- train demo", "is a file of this machine, which file does not reach"),
    ("local -- resume nosuch", "there is no run 'nosuch'"),
    ("local -- train finetune --initial models:/nope@best " + DATA, "there is no registered model 'nope'"),
    ("local -- evaluate models:/nope@best --data {data}/val", "there is no registered model 'nope'"),
    ("local -- register nosuch --name a", "there is no run 'nosuch'"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "line"), REFUSED, ids=[words for words, _ in REFUSED])
def test_command_is_refused_in_a_line(detr: Detr, site: SimpleNamespace, words: str, line: str, store: str) -> None:
    (site.folder / "file").write_text("")
    start = time.monotonic()
    result = detr("submit", *words.format(data=site.data, file=site.folder / "file").split())
    print(f"{time.monotonic() - start:.2f} s: {result.err.strip()}")
    assert result.status in (1, 2)
    assert line in result.line
    assert "hush-hush" not in result.err + result.out
    assert not site.server.job


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, site: SimpleNamespace, _empty_store: Path) -> str:
    """An MLflow store that exists, so that no test makes one."""
    (site.folder / "mlflow.db").write_bytes(_empty_store.read_bytes())
    return f"sqlite:///{site.folder}/mlflow.db"


def test_mlflow_that_does_not_answer_is_an_error(
    detr: Detr, monkeypatch: pytest.MonkeyPatch, server: JobServer
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    result = detr("submit", "local", "--", "train", "demo")
    assert (result.status, server.job) == (1, {})
    assert "no MLflow answers at http://127.0.0.1:9" in result.line


def test_server_that_accepts_and_stays_silent_is_an_error(detr: Detr, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_engine, "_ANSWER_S", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        result = detr("submit", "local", "--address", address, "--", "train", "demo")
    assert result.status == 1
    assert f"no Ray job server answers at {address}" in result.line


def test_a_sweep_is_sent_with_the_storage_of_the_entry(detr: Detr, site: SimpleNamespace, tmp_path: Path) -> None:
    sent = detr("submit", "small", "--write", "-", "--", "sweep", "lr", "demo", "--seed", "1,2")
    assert sent.status == 0, sent.err
    assert f"-m jobs.cli sweep lr demo --seed 1,2 --storage {tmp_path}/runs" in sent.out


def test_a_written_file_comes_with_the_command_that_submits_it(detr: Detr, site: SimpleNamespace) -> None:
    written = detr("submit", "k8s", "--write", "it.yaml", "--", "demo")
    assert (written.status, written.out) == (0, "submit it   kubectl --namespace=default create -f it.yaml\n")


def test_the_working_folder_is_no_secret(detr: Detr, site: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PWD", "OLDPWD"):
        monkeypatch.setenv(name, str(site.folder))
    sent = detr("submit", "small", "--write", "-", "--", "train", "demo", "--storage", site.folder / "runs")
    assert sent.status == 0, sent.err


@pytest.mark.parametrize(("words", "asked"), [("", []), ("--run mine", ["mine"])])
def test_a_dry_run_looks_for_checkpoints_of_a_known_run_only(
    detr: Detr, site: SimpleNamespace, store: str, monkeypatch: pytest.MonkeyPatch, words: str, asked: list[str]
) -> None:
    runs: list[str] = []
    monkeypatch.setattr("jobs.forecast._begin", lambda config, run: runs.append(run) or 0 if run else 0)
    result = detr("submit", "small", "--dry-run", "--", "train", "demo", *words.split())
    assert (result.status, runs) == (0, asked), result.err


def test_a_server_that_does_not_say_which_nodes_it_has_gets_the_job(
    detr: Detr, server: JobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    server.missing = "/api/v0/nodes"
    assert detr("submit", "local", "--", "train", "demo", "--cluster.workers", "16").status == 0
    assert server.job


def test_plain_http_beyond_this_machine_is_warned_of(
    detr: Detr, monkeypatch: pytest.MonkeyPatch, site: SimpleNamespace
) -> None:
    (site.folder / "detr.toml").write_text(
        '[clusters.far]\nlauncher = "ray"\naddress = "http://head.example:8265"\nstorage = "/shared/runs"\n'
        'mlflow = "http://mlflow.example"\non_cluster = ["/shared", "http://mlflow.example"]\n'
    )
    result = detr("submit", "far", "--dry-run", "--", "shard", "info", "/shared/coco")
    assert result.status == 0
    warned = [line.split()[1:6] for line in result.err.splitlines() if "encrypted" in line]
    assert warned == [
        ["MLflow", "at", "http://mlflow.example", "is", "not"],
        ["Ray's", "job", "server", "at", "http://head.example:8265"],
    ]


def test_an_image_by_its_tag_is_warned_of(site: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(site.folder)
    k8s = find_cluster("k8s")
    assert list(warnings_of(k8s)) == []
    (warning,) = warnings_of(msgspec.structs.replace(k8s, image="registry/detr:latest"))  # type: ignore[call-arg]
    assert "image registry/detr:latest of k8s is a tag" in warning


def test_refusals_import_no_torch(site: SimpleNamespace) -> None:
    refused = [words for words, _ in REFUSED if "models:/" not in words and "nosuch" not in words]
    (site.folder / "file").write_text("")
    code = f"""
import contextlib, io, sys
from jobs.cli import run
for words in {[words.format(data=site.data, file=site.folder / "file").split() for words in refused]!r}:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        assert run(["submit", *words])
    heavy = {{"torch", "torchvision", "mlflow", "pandas"}} & sys.modules.keys()
    assert not heavy, (words, heavy)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=site.folder
    )
    assert done.returncode == 0, done.stderr


def test_a_dry_run_writes_the_file_and_no_folder(detr: Detr, site: SimpleNamespace) -> None:
    before = set(site.folder.rglob("*"))
    written = detr("submit", "small", "--dry-run", "--write", "it.sh", "--", "demo")
    assert (written.status, written.out.split(";")[0]) == (0, "written     it.sh"), written.err
    made = {path.name for path in set(site.folder.rglob("*")) - before if "mlflow" not in path.name}
    assert made == {"it.sh"}
