"""`meta.json` of every format, and damaged ones."""

import json
from pathlib import Path

import msgspec
import pytest

from pipeline.checkpoint import state as checkpoint_state
from pipeline.checkpoint.metadata import read_meta
from pipeline.errors import CheckpointError
from tests.support.checkpoints import meta, save_small, small

FORMAT_1 = b"""{"step": 3, "epoch": 0.75, "samples": 6, "run_id": "r", "seed": 1, "batch_size": 2, "train_digest": "d",
"num_classes": 2, "code_commit": "c", "world_size": 1, "versions": {"torch": "2.11"}, "format": 1}"""


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"step": "three"}',
        b'{"format": "three"}',
        msgspec.json.encode(msgspec.to_builtins(meta(3)) | {"new": 1}),
        msgspec.json.encode(msgspec.to_builtins(meta(3, config={"seed": 1, "data": 5}))),
        msgspec.json.encode(msgspec.to_builtins(meta(3)) | {"format": 2, "config": 7}),
    ],
)
def test_a_damaged_meta_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    path = save_small(tmp_path, 3)
    (path / "meta.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"meta\.json cannot be read .*expected a complete checkpoint") as caught:
        read_meta(path)
    assert "\n" not in str(caught.value)


def test_metadata_of_format_1_is_read(tmp_path: Path) -> None:
    path = save_small(tmp_path, 3)
    (path / "meta.json").write_bytes(FORMAT_1)
    config = {
        "seed": 1,
        "optim": {"batch_size": 2},
        "data": {"sort_window": 1, "shuffle_shards": 0, "epoch_tail": "straddle"},
    }
    read = read_meta(path)
    assert read == meta(3, config=config)
    assert (read.best, read.ema, read.milestone, read.state_folder) == (None, False, False, "")
    checkpoint_state.load_weights(path, small(2)[0])


def test_options_of_format_2_are_moved_into_the_configuration(tmp_path: Path) -> None:
    path = save_small(tmp_path, 3)
    fields = json.loads((path / "meta.json").read_text())
    del fields["state_folder"]
    fields["config"]["optim"] |= {"ema": 0.9, "batch_size": 7}
    fields |= {"format": 2, "seed": 3, "batch_size": 7, "sort_window": 2, "shuffle_shards": 4, "epoch_tail": "short"}
    (path / "meta.json").write_text(json.dumps(fields | {"ema": True, "part": "8f1c"}))
    read = read_meta(path)
    assert (read.format, read.ema, read.state_folder) == (3, True, "8f1c")
    assert (read.option("seed"), read.option("optim.batch_size")) == (3, 7)
    options = [read.option(f"data.{name}") for name in ("sort_window", "shuffle_shards", "epoch_tail")]
    assert options == [2, 4, "short"]
