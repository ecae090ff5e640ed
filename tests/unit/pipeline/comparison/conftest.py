"""A registry of versions whose detections on a data set in memory are kept."""

from functools import partial

import pytest

from pipeline.tracking.mlflow_client import connect
from shards.score.difference import difference
from tests.support.scored_versions import Registry, grid_data


@pytest.fixture
def registry(store: str, monkeypatch: pytest.MonkeyPatch) -> Registry:
    data = grid_data()
    monkeypatch.setattr("pipeline.comparison.compare.load_manifest", lambda url: data)
    monkeypatch.setattr("pipeline.evaluation.kept.difference", partial(difference, draws=60))
    return Registry(connect(), data)
