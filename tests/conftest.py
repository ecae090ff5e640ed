"""Fixtures of several packages' tests (a tiny data set, a short run over it, an MLflow store), and the order of the tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before torch is imported: the tests run on few cores, several at a time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # before a test imports MLflow without `connect`

import pytest

from detr.config import TransformConfig
from tests.support.made_once import made_once
from tests.support.tiny_data import TinyData
from tests.support.tiny_model import TINY_MODEL

if TYPE_CHECKING:  # the tests of `detr` also run where only torch, torchvision and scipy are
    from pipeline.config import RunConfig

_SLOW = pytest.StashKey[set[str]]()


_STARTS_RAY = "tests/e2e/"
"""Modules of `make test` that run one after the other: beside unit tests, which leave no core idle, two clusters are slow.

Those of `make slow` wait more than they compute, for starts, kills and leases. There two clusters run at a time.
"""
_LONGEST_FIRST = (
    *("e2e/test_hosts", "e2e/test_lost_nodes", "e2e/test_kills", "e2e/test_launchers", "e2e/test_production_store"),
    *("e2e/test_outages", "e2e/test_sweep", "e2e/test_poor_mounts", "e2e/test_full_disk", "e2e/test_repeated_errors"),
    *("e2e/test_stopped_groups", "e2e/", "integration/evaluation/test_coco", "integration/checkpoint/test_killed"),
    *("integration/cluster/test_background_evaluation", "integration/cluster/test_ray_notes", "integration/"),
    *("unit/detr/test_compute", "unit/pipeline/exchange/test_export_onnx", "parity/"),
)
"""Beginnings of modules in the order in which they start, so that no process ends long before the other."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each process whole modules, because their fixtures are expensive, and one process all that start Ray.

    By path, because pytest-xdist 3.8 loses the names of groups under pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    one_cluster = config.option.markexpr != "slow"

    class Modules(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.partition("::")[0]
            return "ray" if one_cluster and module.startswith(_STARTS_RAY) else module

        def _reschedule(self, node: Any) -> None:
            """Give a process its next module with its last test, and not three tests before: some tests take minutes."""
            if self._pending_of(self.assigned_work[node]) < 2:
                super()._reschedule(node)

    return Modules(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the modules that take longest first."""

    def place(item: pytest.Item) -> int:
        module = item.nodeid.removeprefix("tests/")
        return next((n for n, start in enumerate(_LONGEST_FIRST) if module.startswith(start)), len(_LONGEST_FIRST))

    items.sort(key=place)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SLOW] = set()


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow"):
            item.config.stash[_SLOW].add(item.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Pass the names on to the process that reports."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["slow"] = sorted(session.config.stash[_SLOW])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[_SLOW].update(getattr(node, "workeroutput", {}).get("slow", []))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """List the tests that `make test` leaves to `make slow`."""
    left = sorted(config.stash[_SLOW])
    if left and config.option.markexpr == "not slow":
        terminalreporter.section(f"left to `make slow`: {len(left)} tests")
        for name in left:
            terminalreporter.write_line(name)


@pytest.fixture(scope="session", autouse=True)
def _folders_of_the_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep cached files and spools of tests out of the folders of the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETR_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("DETR_SCRATCH", str(tmp_path_factory.mktemp("scratch")))
        yield


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """Return a data set that is generated and sharded once; tests must not write into it."""
    from shards.config import WriteConfig
    from shards.synthetic import write_synthetic
    from shards.write.writer import write_coco

    root = tmp_path_factory.mktemp("tiny")
    made = write_synthetic(root / "coco", train=12, val=5, size=64)
    for name, split in (("train", made.train), ("val", made.val)):
        write_coco(split.images, split.annotations, root / name, WriteConfig(samples_per_shard=5))
    return TinyData(root, str(root / "train"), str(root / "val"))


@pytest.fixture(scope="session")
def tiny_config(tiny_data: TinyData) -> RunConfig:
    """Return a run of two epochs of three steps of four images; dropout and flips are on, so that their seeds matter."""
    from pipeline.config import CheckpointConfig, DataConfig, EvaluateConfig, OptimConfig, RunConfig, TrackConfig

    return RunConfig(
        recipe="tiny",
        storage=str(tiny_data.root / "runs"),
        model=TINY_MODEL,
        transform=TransformConfig(train_scales=(48, 64), max_size=64, eval_size=64, crop=False),
        data=DataConfig(train=tiny_data.train, val=tiny_data.val, reader_threads=1),
        optim=OptimConfig(batch_size=4, epochs=2, lr=1e-3, lr_backbone=1e-4, decay_epoch=1),
        evaluate=EvaluateConfig(batch_size=2, pictures=1),
        checkpoint=CheckpointConfig(every_steps=0),
        track=TrackConfig(log_every=1, wait_s=0.0),
    )


@pytest.fixture(scope="session")
def short_config(tiny_config: RunConfig) -> RunConfig:
    """Return a run of one step and one evaluation."""
    return replace(tiny_config, optim=replace(tiny_config.optim, max_steps=1))


# A mask head, which needs 128 channels and 8 heads at least.
TINY_MASKS = replace(TINY_MODEL, masks=True, hidden_dim=128, heads=8)


@pytest.fixture(scope="session")
def masks_config(tiny_config: RunConfig) -> RunConfig:
    """Return `tiny_config` with masks, for one epoch."""
    return replace(tiny_config, model=TINY_MASKS, optim=replace(tiny_config.optim, epochs=1))


@pytest.fixture(scope="session")
def _empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an MLflow store with its schema, made once and copied, because migrations take seconds."""
    from pipeline.tracking.mlflow_client import connect

    return (
        made_once(tmp_path_factory, "store", lambda folder: connect(f"sqlite:///{folder / 'mlflow.db'}")) / "mlflow.db"
    )


@contextmanager
def _store_in(folder: Path, empty: Path) -> Iterator[str]:
    import mlflow

    shutil.copy(empty, folder / "mlflow.db")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    stray = Path("mlruns")
    before = stray.exists()
    with pytest.MonkeyPatch.context() as patch:
        # For each new store MLflow imports its 70 migrations again, to compare with their last one.
        patch.setattr("mlflow.store.db.utils._verify_schema", lambda engine: None)
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        patch.delenv("MLFLOW_REGISTRY_URI", raising=False)
        yield uri
    mlflow.set_tracking_uri(None)
    mlflow.set_registry_uri(None)
    # MLflow writes the artifacts of an experiment without a location there: make it with `mlflow_runs.experiment_id`.
    assert before or not stray.exists(), "a test has written artifacts into the working folder"


@pytest.fixture
def store(_empty_store: Path, tmp_path: Path) -> Iterator[str]:
    """Return the URI of the test's own MLflow store in `tmp_path`, which is also the current one."""
    with _store_in(tmp_path, _empty_store) as uri:
        yield uri


@pytest.fixture(scope="module")
def shared_store(_empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return a store that a module's tests share and only read; a test uses `store` or this."""
    with _store_in(tmp_path_factory.mktemp("shared"), _empty_store) as uri:
        yield uri
