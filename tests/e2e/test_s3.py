"""A run whose shards and checkpoints lie on an S3 server: trained, evaluated and registered from there, without its
secrets anywhere.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import TinyData
from tests.e2e_command import TINY, Command
from tests.s3_server import SECRET, S3Server

pytestmark = pytest.mark.xdist_group("ray")


@pytest.mark.usefixtures("store")  # with its schema made, in `tmp_path`
def test_two_workers_train_from_s3_and_fetch_each_shard_once(
    tiny_data: TinyData, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    server = S3Server(tmp_path_factory.mktemp("s3"), written=True)
    try:
        urls = [server.put(Path(folder), Path(folder).name) for folder in (tiny_data.train, tiny_data.val)]
        data = ["--data.train", urls[0], "--data.val", urls[1], "--checkpoint.store", "s3://sets/runs"]
        with Command(tmp_path) as detr:
            detr.env |= server.environment | {"DETR_CACHE": str(tmp_path_factory.mktemp("kept"))}
            output = detr("train", "overfit", *data, *TINY, "--optim.max-steps", "6", "--track.run-name", "from-s3")
    finally:
        server.stop()
    assert detr.runs_named("from-s3") == ["FINISHED"]
    assert detr.points("from-s3", "train/loss")[-1] == 6
    assert len(detr.points("from-s3", "val/AP")) == 1
    shards = Counter(server.gets(".tar"))
    assert {name.split("/")[0] for name in shards} == {"train", "val"}
    assert set(shards.values()) == {1}
    assert Counter(server.gets(".npy")).most_common(1)[0][1] == 1
    kept = [path for path in (server.root / "sets" / "runs").rglob("*") if path.is_file()]
    assert {path.name for path in kept} - {"__1_0.distcp"} == {
        "meta.json",
        "evaluation.json",
        ".metadata",
        "__0_0.distcp",
    }
    assert not list(detr.folder.glob("runs/*/checkpoints"))
    assert "best        s3://sets/runs/from-s3-" in output
    assert not [path for path in kept if SECRET.encode() in path.read_bytes()]
    files = [path for path in detr.folder.rglob("*") if path.is_file()]
    assert any(path.name == "mlflow.db" for path in files)
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert SECRET not in output
