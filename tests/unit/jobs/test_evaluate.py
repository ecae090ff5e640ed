"""`detr evaluate`: figures that are computed stay, and belong to the version that was evaluated."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.evaluation.evaluate_model import Evaluation
from shards.score.coco_eval import score_detections
from tests.support.in_process import Detr
from tests.support.scored_versions import grid_data, perfect

KEEPERS = ("pipeline.inference.kept_figures.keep_evaluation", "pipeline.registry.reports.keep_report")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the addresses of versions that are asked for, with an alias that moves to the next version each time."""
    addresses: list[str] = []
    data = grid_data(5)
    evaluation = Evaluation(score_detections(data, perfect(data)), perfect(data), np.arange(data.images))
    numbers = iter(range(1, 9))

    def evaluate(uri: str, *_: Any, **__: Any) -> Evaluation:
        addresses.append(uri)
        return evaluation

    def write_report(uri: str, *_: Any) -> tuple[Path, str]:
        addresses.append(uri)
        return Path("page.html"), "d"

    def fail(uri: str, *_: Any) -> str:
        addresses.append(uri)
        raise ValueError("damaged")

    def find_version(client: Any, uri: str) -> Any:
        return fail(uri)

    monkeypatch.setattr("pipeline.registry.versions.pinned", lambda uri: f"models:/m/{next(numbers)}")
    monkeypatch.setattr("pipeline.inference.evaluate.evaluate", evaluate)
    monkeypatch.setattr("pipeline.inference.report.write_report", write_report)
    monkeypatch.setattr("pipeline.comparison.compare.connect", lambda: None)
    monkeypatch.setattr("pipeline.comparison.compare.find_version", find_version)
    for name in KEEPERS:
        monkeypatch.setattr(name, fail)
    return addresses


def test_computed_figures_stay_whatever_mlflow_answers(detr: Detr, asked: list[str], tmp_path: Path) -> None:
    result = detr("evaluate", "models:/m@best", "--data", "data", "--json", "figures.json", "--report", "report")
    assert result.status == 0
    assert "AP" in result.out
    assert json.loads((tmp_path / "figures.json").read_text())["AP"] > 0.5
    for what in ("the detections are", "these figures are", "the page is"):
        assert f"{what} not in MLflow (damaged)" in result.err or f"{what} not kept in MLflow (damaged)" in result.err


def test_all_is_of_the_version_that_the_alias_named_first(detr: Detr, asked: list[str]) -> None:
    detr("evaluate", "models:/m@best", "--data", "data", "--report", "report")
    assert asked == ["models:/m/1"] * 5
