"""Refusal of a cluster that does not answer or can never fit the workers."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import ray

from pipeline.cluster.ray_session import join_cluster, start_local_ray
from pipeline.cluster.resources import check_resources
from pipeline.config import ClusterConfig, RunConfig
from pipeline.errors import PipelineError, RunConfigError
from pipeline.recipes import RECIPES


def check(monkeypatch: pytest.MonkeyPatch, have: dict[str, float], config: RunConfig, address: str | None) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: have)
    check_resources(config, address)


@pytest.mark.parametrize(("address", "where"), [(None, "this machine"), ("auto", "the cluster")])
def test_too_few_gpus_are_refused(monkeypatch: pytest.MonkeyPatch, address: str | None, where: str) -> None:
    config = RECIPES["detr-r50-8gpu"]
    for have in ({}, {"GPU": 7.0}):
        with pytest.raises(
            RunConfigError,
            match=rf"^{where} has {int(have.get('GPU', 0))} GPUs but 8 workers .*--address.*--cluster.gpu no.*--smoke",
        ) as caught:
            check(monkeypatch, {"CPU": 999.0, **have}, config, address)
        assert "\n" not in str(caught.value)
    check(monkeypatch, {"CPU": 999.0, "GPU": 8.0}, config, address)


def test_cpus_are_counted_on_a_cluster_and_not_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = ClusterConfig(workers=4, min_workers=3, cpus_per_worker=2)
    config = replace(RECIPES["demo"], cluster=cluster)
    check(monkeypatch, {"CPU": 2.0}, config, None)
    check(monkeypatch, {"CPU": 6.0}, config, "auto")
    with pytest.raises(RunConfigError, match=r"has 5 CPUs but 3 workers need 6; .* lower --cluster.min-workers"):
        check(monkeypatch, {"CPU": 5.0}, config, "auto")


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
