import pytest

from pipeline.distributed.parallel import ranks_by_node
from pipeline.errors import RunConfigError


def test_nodes_have_equally_many_ranks_in_any_order() -> None:
    assert ranks_by_node(["b", "a", "b", "a"]) == [[0, 2], [1, 3]]
    assert ranks_by_node(["a"] * 3) == [[0, 1, 2]]
    with pytest.raises(RunConfigError, match=r"got hsdp with 2, 1 workers on 2 nodes, expected.*--cluster.workers"):
        ranks_by_node(["a", "b", "a"])
