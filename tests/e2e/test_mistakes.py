"""Mistakes of users: the command says each in one line, as a real process whose libraries may print as well."""

import shutil

import pytest

from tests.support.command import Command
from tests.support.ray_nodes import free_port


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["train", "overfti"], 2, "overfit"),
        (["train", "overfit", "--optim.lrr", "1"], 2, "--optim.lr"),
        (["train", "overfit", "--data.train", "nowhere"], 1, "nowhere"),
        (["evaluate", "models:/nothing@best", "--data", "data/val"], 1, "nothing"),
        (["resume", "no-such-run"], 1, "no-such-run"),
        (["shard", "coco", "--images", "nowhere", "--annotations", "x.json", "--out", "y"], 1, "nowhere"),
        (["shard", "coco", "--images", "coco/val", "--annotations", "coco/val/broken.json", "--out", "y"], 1, "broken"),
    ],
)
def test_mistake_is_one_clear_line(detr: Command, words: list[str], status: int, message: str) -> None:
    (detr.folder / "coco/val/broken.json").write_text("{not json")
    output = detr(*words, status=status)
    assert len(output.splitlines()) == 1
    assert message in output


def test_truncated_shard_is_found_before_anything_starts(detr: Command) -> None:
    shutil.copytree(detr.folder / "data/train", detr.folder / "cut")
    shard = detr.folder / "cut/shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-2000])
    output = detr("train", "overfit", "--data.train", "cut", "--data.val", "data/val", status=1)
    assert len(output.splitlines()) == 1
    assert "shard-000000.tar" in output


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["train", "overfti"], 2, ""),
        (["train", "overfit", "--optim.lrr", "1"], 2, ""),
        (["trian"], 1, ""),
        (["train", "overfit", "--data.train", "nowhere"], 1, "nowhere"),
    ],
)
def test_submit_refuses_what_would_fail_on_the_cluster(
    detr: Command, words: list[str], status: int, message: str
) -> None:
    output = detr("submit", "local", "--", *words, status=status)
    assert len(output.splitlines()) == 1
    assert message in output


def test_unreachable_cluster_is_one_clear_line(detr: Command) -> None:
    output = detr("jobs", "list", "--address", f"http://127.0.0.1:{free_port()}", status=1)
    assert len(output.splitlines()) == 1
    assert "ray start --head" in output
