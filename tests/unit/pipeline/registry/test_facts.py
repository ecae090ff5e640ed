"""Facts about a version, from what a store returns."""

from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.registry import facts
from pipeline.registry.facts import _figures, facts_about, model_id_of
from pipeline.tracking.tags import TAG_INITIAL_WEIGHTS

RUN: Any = SimpleNamespace(info=SimpleNamespace(run_id="trained"))
ID = f"m-{'0123456789abcdef' * 2}"


def metric(key: str, value: float, run_id: str, time_ms: int, data: str | None = "val") -> Any:
    digest = data and f"{data} digest"
    return SimpleNamespace(
        key=key, value=value, run_id=run_id, timestamp=time_ms, dataset_name=data, dataset_digest=digest
    )


@pytest.mark.parametrize(
    ("source", "model_id"),
    [
        (f"models:/{ID}", ID),
        (f"s3://bucket/1/models/{ID}/artifacts", ID),
        ("runs:/0123456789abcdef/model", ""),
        ("models:/other/3", ""),
    ],
)
def test_the_logged_model_of_a_version_is_named_by_its_source(source: str, model_id: str) -> None:
    assert model_id_of(SimpleNamespace(source=source)) == model_id


def test_figures_are_those_of_the_run_then_the_newest_evaluation_of_each_data_set() -> None:
    metrics = [
        metric("evaluate/AP", 0.2, "later", 3, "test"),
        metric("val/AP", 0.5, "trained", 1),
        metric("evaluation/seconds", 9.0, "trained", 1, None),
        metric("evaluate/AP", 0.1, "earlier", 2, "test"),
        metric("val/AP50", 0.7, "trained", 1),
        metric("evaluate/AP", 0.4, "again", 4),
    ]
    found = [(figures.data, figures.run_id, figures.metrics) for figures in _figures(metrics, {}, RUN)]
    assert found == [
        ("val", "trained", {"AP": 0.5, "AP50": 0.7}),
        ("test", "later", {"AP": 0.2}),
        ("val", "again", {"AP": 0.4}),
    ]


def test_an_evaluation_without_masks_hides_no_earlier_figures_of_masks() -> None:
    metrics = [
        metric("evaluate/AP", 0.4, "layers", 3),
        metric("evaluate/AP", 0.3, "whole", 2),
        metric("evaluate/mask_AP", 0.2, "whole", 2),
    ]
    (figures,) = _figures(metrics, {}, RUN)
    assert (figures.run_id, figures.metrics) == ("layers", {"AP": 0.4, "mask_AP": 0.2})


def test_a_version_of_an_older_release_has_the_figures_of_its_tags() -> None:
    found = _figures([], {"AP": "0.500000", "AP50": "0.7", "val_digest": "d" * 64, "epoch": "3"}, RUN)
    assert [(figures.digest, figures.metrics) for figures in found] == [("d" * 36, {"AP": 0.5, "AP50": 0.7})]


@pytest.mark.parametrize(
    ("initial", "line"),
    [("models:/m@best", ["2"]), ("models:/m/2", ["2"]), ("models:/m/1", ["2", "1"])],
    ids=["alias that has moved to the version", "itself", "parent"],
)
def test_parents_are_followed_by_number_and_never_in_a_circle(
    initial: str, line: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(client: Any, uri: str) -> Any:
        return SimpleNamespace(name="m", version="1" if uri == "models:/m/1" else "2", tags={}, run_id="r", source="")

    info = SimpleNamespace(run_id="r", run_name="run", experiment_id="1")
    tags = {TAG_INITIAL_WEIGHTS: f"starting from {initial}"}
    run = SimpleNamespace(info=info, data=SimpleNamespace(tags=tags), inputs=SimpleNamespace(dataset_inputs=[]))
    client: Any = SimpleNamespace(
        get_run=lambda _: run, get_registered_model=lambda _: SimpleNamespace(aliases={"best": "2"})
    )
    monkeypatch.setattr(facts, "find_version", find)
    monkeypatch.setattr(facts, "_config", lambda *_: SimpleNamespace(initial=initial))
    found: Any = facts_about(client, "models:/m/2")
    assert found.initial_weights == f"starting from {initial}"
    chain = []
    while found:
        chain.append(found.version)
        found = found.parent
    assert chain == line
