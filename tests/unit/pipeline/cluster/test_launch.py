"""Refusal of a cluster that does not answer."""

from collections.abc import Callable
from functools import partial

import pytest
import ray

from pipeline.cluster.ray_session import join_cluster, start_local_ray
from pipeline.errors import PipelineError
from pipeline.recipes import RECIPES


@pytest.mark.parametrize(
    ("connect", "message"),
    [
        (
            partial(join_cluster, "10.0.0.7:6379", verbose=False),
            r"^no Ray cluster answers at 10\.0\.0\.7:6379 \(too late\); expected .*: check --address$",
        ),
        (
            partial(start_local_ray, RECIPES["demo"], verbose=False),
            r"^Ray does not start on this machine \(too late\); expected .*--verbose.*--address",
        ),
    ],
)
def test_a_ray_that_does_not_answer_is_one_line(
    monkeypatch: pytest.MonkeyPatch, connect: Callable[[], None], message: str
) -> None:
    def init(**_: object) -> None:
        raise ConnectionError("too late\nand more")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(PipelineError, match=message) as caught:
        connect()
    assert "\n" not in str(caught.value)
