from dataclasses import replace

import pytest
from torch import nn

from pipeline.distributed.parallel import distribute, local_tensor, ranks_by_node
from pipeline.distributed.ranks import Ranks
from pipeline.errors import RunConfigError
from tests.support.ranks import run_ranks


def test_nodes_have_equally_many_ranks_in_any_order() -> None:
    assert ranks_by_node(["b", "a", "b", "a"]) == [[0, 2], [1, 3]]
    assert ranks_by_node(["a"] * 3) == [[0, 1, 2]]
    with pytest.raises(RunConfigError, match=r"got hsdp with 2, 1 workers on 2 nodes, expected.*--cluster.workers"):
        ranks_by_node(["a", "b", "a"])


def rows_on_uneven_nodes(ranks: Ranks) -> int:
    model = nn.Linear(1, 3, bias=False)
    distribute(model, replace(ranks, node="aba"[ranks.rank]), "hsdp", uneven=True)
    return len(local_tensor(model.weight))


def test_a_group_that_shrank_to_uneven_nodes_shards_over_all_ranks() -> None:
    assert run_ranks(3, rows_on_uneven_nodes) == [1, 1, 1]
