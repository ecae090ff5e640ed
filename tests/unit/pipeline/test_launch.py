"""A cluster that can never fit the workers is refused before they wait for it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from pipeline.config import ClusterConfig
from pipeline.errors import RunConfigError
from pipeline.launch import _check_resources
from pipeline.recipes import RECIPES


def with_resources(**have: float) -> SimpleNamespace:
    return SimpleNamespace(cluster_resources=lambda: dict(have))


@pytest.mark.parametrize(("address", "where"), [(None, "this machine"), ("auto", "the cluster")])
def test_a_recipe_for_gpus_is_refused_where_there_are_too_few(address: str | None, where: str) -> None:
    config = RECIPES["detr-r50-8gpu"]
    for have in ({}, {"GPU": 7.0}):
        with pytest.raises(
            RunConfigError,
            match=rf"^{where} has {int(have.get('GPU', 0))} GPUs but 8 workers .*--address.*--cluster.gpu no.*--smoke",
        ) as caught:
            _check_resources(with_resources(CPU=999.0, **have), config, address)
        assert "\n" not in str(caught.value)
    _check_resources(with_resources(CPU=999.0, GPU=8.0), config, address)


def test_cpus_are_counted_on_a_cluster_and_not_on_this_machine() -> None:
    cluster = ClusterConfig(workers=4, min_workers=3, cpus_per_worker=2)
    config = replace(RECIPES["demo"], cluster=cluster)
    _check_resources(with_resources(CPU=2.0), config, None)
    _check_resources(with_resources(CPU=6.0), config, "auto")
    with pytest.raises(RunConfigError, match=r"has 5 CPUs but 3 workers need 6; .* lower --cluster.min-workers"):
        _check_resources(with_resources(CPU=5.0), config, "auto")
