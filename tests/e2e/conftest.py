"""The command in a folder with generated data, sharded by the command itself."""

from collections.abc import Iterator

import pytest

from tests.e2e_command import Command


@pytest.fixture(scope="module")
def detr(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """The command in a folder with `data/train` (24 images) and `data/val` (6), sharded by itself from COCO files."""
    from shards.synthetic import write_synthetic

    folder = tmp_path_factory.mktemp("work")
    write_synthetic(folder / "coco", train=24, val=6, size=64)
    command = Command(folder)
    for split in ("train", "val"):
        annotations = f"coco/annotations/instances_{split}.json"
        command("shard", "coco", "--images", f"coco/{split}", "--annotations", annotations, "--out", f"data/{split}")
    yield command
    for process in command.started:
        if process.poll() is None:
            process.kill()
        if process.stdout is not None and not process.stdout.closed:
            process.communicate()  # closes the pipe
