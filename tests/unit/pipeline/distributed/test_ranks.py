from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from pipeline.distributed.ranks import Ranks, is_peer_failure, on_first
from tests.support.ranks import run_ranks


def broadcast_of_rank(ranks: Ranks) -> list[Any]:
    own = Path(f"rank-{ranks.rank}") if ranks.first else None
    return [ranks.broadcast(own), ranks.broadcast(ranks.rank), ranks.with_new_group().broadcast([ranks.rank])]


def fail_on_first(ranks: Ranks) -> str:
    def fail() -> None:
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        on_first(ranks, fail)
    return "raised"


def test_broadcast_returns_the_value_of_rank_0_on_every_rank() -> None:
    assert run_ranks(2, broadcast_of_rank) == [[Path("rank-0"), 0, [0]]] * 2


def test_broadcast_in_a_world_of_one_returns_the_value_itself() -> None:
    value = object()
    assert Ranks().broadcast(value) is value


def test_an_error_of_rank_0_is_raised_on_every_rank() -> None:
    assert run_ranks(2, fail_on_first) == ["raised"] * 2


@pytest.mark.parametrize(
    "error",
    [
        dist.DistError("timed out"),
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"),
        "NCCL communicator was aborted on rank 0.",
    ],
)
def test_errors_of_collectives_are_peer_failures(error: BaseException | str) -> None:
    assert is_peer_failure(error)


def test_other_errors_are_no_peer_failures() -> None:
    assert not is_peer_failure(RuntimeError("shapes differ"))
