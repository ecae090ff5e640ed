"""The command in a folder with generated data, sharded by the command itself."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.command import Command
from tests.support.made_once import made_once
from tests.support.recording import Recording


@pytest.fixture(scope="session")
def _work(tmp_path_factory: pytest.TempPathFactory, _empty_store: Path) -> Path:
    """`data/train` (24 images in 5 shards) and `data/val` (6), sharded from the COCO files beside them, and an empty store."""
    from shards.synthetic import write_synthetic

    def make(folder: Path) -> None:
        write_synthetic(folder / "coco", train=24, val=6, size=64)
        command = Command(folder)
        for split in ("train", "val"):
            source = ["--images", f"coco/{split}", "--annotations", f"coco/annotations/instances_{split}.json"]
            command("shard", "coco", *source, "--out", f"data/{split}", "--samples-per-shard", "5", "--workers", "0")
        shutil.copy(_empty_store, folder / "mlflow.db")

    return made_once(tmp_path_factory, "work", make)


@pytest.fixture(scope="module")
def detr(_work: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """The command in a folder of the module's own with `coco`, `data/train`, `data/val` and an empty MLflow store."""
    with Command(shutil.copytree(_work, tmp_path_factory.mktemp("module") / "work")) as command:
        yield command


@pytest.fixture
def recording(detr: Command, tmp_path: Path) -> Iterator[Recording]:
    """Notes of every training step of the workers that `detr` starts during the test."""
    recording = Recording(tmp_path / "steps")
    before = dict(detr.env)
    detr.env |= recording.environment
    yield recording
    detr.env = before
