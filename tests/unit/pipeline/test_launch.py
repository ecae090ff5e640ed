"""A cluster that does not answer, or can never fit the workers, is refused before they wait for it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from pipeline.config import ClusterConfig
from pipeline.errors import RunConfigError, TrainingError
from pipeline.launch import _check_resources, _connect_ray, brief_losses
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


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("10.0.0.7:6379", r"^no Ray cluster answers at 10\.0\.0\.7:6379 \(too late\); expected .*: check --address$"),
        (None, r"^Ray does not start on this machine \(too late\); expected .*--verbose.*--address"),
    ],
)
def test_a_ray_that_does_not_answer_is_one_line(address: str | None, said: str) -> None:
    def init(**_: object) -> None:
        raise ConnectionError("too late\nand more")

    with pytest.raises(TrainingError, match=said) as caught:
        _connect_ray(SimpleNamespace(init=init), RECIPES["demo"], address, verbose=False)
    assert "\n" not in str(caught.value)


def test_ray_tells_of_a_lost_node_in_one_line_and_of_all_else_as_ever(capsys: pytest.CaptureFixture[str]) -> None:
    from ray._private import worker

    before = worker.print_to_stdstream
    lost = (
        "Raylet is terminated. Last 20 lines of the Raylet logs:\n    [state-dump] NodeManager\n    [state-dump] more"
    )
    said = "  " + "x" * 300
    with brief_losses():
        worker.print_to_stdstream({"lines": [lost], "pid": "raylet", "is_err": False}, ignore_prefix=False)
        worker.print_to_stdstream({"lines": [said], "pid": 7, "ip": "10.0.0.7", "is_err": False}, ignore_prefix=True)
    assert worker.print_to_stdstream is before
    line, other = capsys.readouterr().out.splitlines()
    assert line.endswith("Raylet is terminated. Last 20 lines of the Raylet logs")
    assert said in other
