"""A production store: MLflow on PostgreSQL, artifacts on S3, users with passwords, and workers on a Ray cluster.

Train, evaluate, register, evaluate from an empty folder, serve; and no password in anything that is written, printed or
served.
"""

import base64
import json
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.command import TINY, Command, until
from tests.support.production import SECRETS, Production, encoded, production
from tests.support.ray_nodes import free_port, node, wait_until_open
from tests.support.recording import Recording

pytestmark = pytest.mark.slow
TRAIN = ["train", "overfit", "--data.train", "data/train", "--data.val", "data/val", *TINY, "--cluster.workers", "1"]
_PATIENCE_S = 900
TOKEN = "a-token-of-this-test-alone-0123456789abcdef"
SERVED = [
    *("nodes?view=summary", "nodes?view=details", "logical/actors", "events", "api/cluster_status"),
    *(
        "api/jobs/",
        "api/train/v2/runs/v1",
        "api/v0/tasks/summarize",
        "api/v0/tasks/timeline",
        "api/v0/cluster_metadata",
    ),
    *(f"api/v0/{kind}?detail=true" for kind in ("actors", "tasks", "workers", "nodes", "jobs", "objects")),
    *(f"api/v0/{kind}?detail=true" for kind in ("placement_groups", "runtime_envs", "cluster_events")),
]
"""Pages of Ray's dashboard that show what Ray keeps of a run."""


@dataclass(frozen=True)
class Trained:
    """A run that ended in a registered version, and everything that was printed and served meanwhile."""

    store: Production
    printed: list[str]
    served: dict[str, str]
    folders: list[Path]
    """Folders that the commands, Ray and the node have written into."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Production]:
    with production(tmp_path_factory.mktemp("production")) as started:
        yield started


@pytest.fixture(scope="module")
def ray_files() -> Iterator[Path]:
    """A folder for Ray's files, in a short path for the sockets in it."""
    folder = Path(tempfile.mkdtemp(prefix="detr-ray-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def trained(detr: Command, store: Production, ray_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The first epochs on a cluster whose nodes have the login, the last with the login in MLflow's address and local Ray."""
    port, dashboard = free_port(), free_port()
    scratch = tmp_path_factory.mktemp("spools")
    recording = Recording(tmp_path_factory.mktemp("production-steps") / "steps")
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text(TOKEN)
    address = f"127.0.0.1:{port}"
    detr.env |= {
        "MLFLOW_TRACKING_URI": store.server.url,
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_TMPDIR": str(ray_files),
        "DETR_SCRATCH": str(scratch),
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # what Ray Train keeps of a run where its page of runs is used
        **store.login,
    }
    printed: list[str] = []
    with ExitStack() as stack:
        nodes = detr.env | recording.environment | {"RAY_AUTH_MODE": "token"}
        head = ["--head", "--port", str(port), "--dashboard-port", str(dashboard), "--dashboard-host", "127.0.0.1"]
        stack.enter_context(node(detr.folder, nodes, *head))
        wait_until_open(dashboard)
        recording.pace(0.5)
        driver = detr.start(*TRAIN, "--optim.epochs", "2", "--run", "production", "--address", address)
        until(lambda: recording.last()[0] >= 3 or driver.poll() is not None, "3 steps", 600)
        recording.pace(5)  # so that the run does not end while its pages are read
        served = {page: _page(dashboard, page) for page in SERVED}
        recording.pace(0)
        output, _ = driver.communicate(timeout=_PATIENCE_S)
        assert driver.returncode == 0, output
        printed.append(output)
        served |= {f"{page} afterwards": _page(dashboard, page) for page in SERVED}
    detr.env["MLFLOW_TRACKING_URI"] = store.uri_with_login
    for name in store.login:
        del detr.env[name]
    driver = detr.start("resume", "production", "--epochs", "3")
    output, _ = driver.communicate(timeout=_PATIENCE_S)
    assert driver.returncode == 0, output
    printed.append(output)
    return Trained(store, printed, served, [detr.folder, ray_files, scratch, recording.folder])


def _page(port: int, page: str) -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{page}", headers={"Authorization": f"Bearer {TOKEN}"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return str(answer.read().decode(errors="replace"))
    except urllib.error.HTTPError as error:
        return f"{error.code} {error.read().decode(errors='replace')}"


def test_the_run_and_its_versions_are_in_postgresql_and_s3(trained: Trained, detr: Command) -> None:
    listed = detr("runs")
    assert re.search(r"production\b.*finished", listed), listed
    names = {path.name for path in trained.store.objects}
    assert {"config.json", "MLmodel"} <= names
    assert any(name.endswith(".safetensors") for name in names)
    assert not list(detr.folder.glob("mlartifacts/*/*/artifacts/config.json"))


def test_a_version_is_evaluated_from_an_empty_folder(trained: Trained, detr: Command, tmp_path: Path) -> None:
    with Command(tmp_path) as elsewhere:
        elsewhere.env = dict(detr.env)
        data = str(detr.folder / "data" / "val")
        output = elsewhere("evaluate", "models:/detr-overfit@best", "--data", data, "--json", "figures.json")
        trained.printed.append(output)
    figures = json.loads((tmp_path / "figures.json").read_text())
    evaluated = [
        json.loads(path.read_text()) for path in detr.folder.glob("runs/production/checkpoints/*/evaluation.json")
    ]
    assert any(figures == pytest.approx(metrics, abs=1e-6) for metrics in evaluated), (figures, evaluated)
    assert not (tmp_path / "mlflow.db").exists()
    assert not (tmp_path / "mlruns").exists()


def test_a_version_is_served(trained: Trained, detr: Command, tmp_path: Path) -> None:
    port = free_port()
    words = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", "models:/detr-overfit@best"]
    words += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    bin_folder = str(Path(sys.executable).parent)
    env = detr.env | {
        "PATH": f"{bin_folder}:{detr.env['PATH']}",
        "MLFLOW_REGISTRY_URI": detr.env["MLFLOW_TRACKING_URI"],
    }
    with (tmp_path / "serve.log").open("wb") as log:
        server = subprocess.Popen(words, cwd=tmp_path, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until_open(port)
        image = base64.b64encode(next((detr.folder / "coco/val").glob("*.jpg")).read_bytes()).decode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            data=json.dumps({"dataframe_records": [{"image": image}], "params": {"threshold": 0.0}}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            assert "predictions" in json.loads(answer.read())
    finally:
        subprocess.run(["kill", "-9", "--", f"-{server.pid}"], check=False)
        server.wait()


def test_no_password_is_printed_written_or_served(trained: Trained) -> None:
    """Last: everything before has left its traces. MLflow's own database has hashes, and the servers' settings are no trace."""
    assert '"train_runs"' in trained.served["api/train/v2/runs/v1"], trained.served["api/train/v2/runs/v1"]
    answered = [name for name, text in trained.served.items() if not text.startswith(("4", "5"))]
    assert len(answered) > len(SERVED), trained.served
    assert "train_in_ray" in str(trained.served) or "RayTrainWorker" in str(trained.served)
    texts = {f"printed {number}": text for number, text in enumerate(trained.printed)}
    texts |= {f"page {name}": text for name, text in trained.served.items()}
    found = [name for name, text in texts.items() if holds_secret(text.encode())]
    files = [path for folder in trained.folders for path in folder.rglob("*") if path.is_file()]
    files += trained.store.objects
    assert len(files) > 100
    found += [str(path) for path in files if holds_secret(path.read_bytes())]
    dump = trained.store.database.dump()
    assert b"detr-overfit" in dump
    found += ["PostgreSQL"] if holds_secret(dump) else []
    assert not found


def holds_secret(content: bytes) -> bool:
    """Return whether a password or the login in base64 is in it."""
    return any(secret.encode() in content for secret in (*SECRETS, encoded().rstrip("=")))
