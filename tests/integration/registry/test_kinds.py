"""Registered versions of the variants, and of averages of weights, evaluate as their runs did."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from detr.config import DeformableConfig
from detr.model import build_model
from pipeline.checkpoint import catalog
from pipeline.checkpoint import state as checkpoint_state
from pipeline.config import RunConfig
from pipeline.inference.evaluate import evaluate
from pipeline.registry.registration import register_run
from pipeline.registry.versions import find_version, read_version
from tests.support.registry import train_in

HYBRID = DeformableConfig(levels=3, box_refine=True, two_stage=True, mixed_selection=True, one_to_many_queries=6)


@pytest.mark.parametrize(("variant", "options"), [("deformable", HYBRID), ("conditional", DeformableConfig())])
def test_a_registered_version_of_a_variant_evaluates_as_its_run_did(
    store: str, short_config: RunConfig, tmp_path: Path, variant: Any, options: DeformableConfig
) -> None:
    model = replace(short_config.model, variant=variant, hidden_dim=32, deformable=options)
    own = train_in(tmp_path, replace(short_config, model=model))
    register_run(own.run_id, name=variant, alias="best")
    best = catalog.best(own.folder)
    assert best is not None
    found = evaluate(f"models:/{variant}@best", own.config.data.val)
    assert found.score.metrics == pytest.approx(best[1], abs=1e-6)
    assert len(found.detections.scores) == 5 * 8 * 4  # every pair of a query and a class, not one class per query


def test_a_version_of_a_run_with_averages_has_them_and_names_the_decay(
    store: str, short_config: RunConfig, tmp_path: Path
) -> None:
    trained = train_in(tmp_path, replace(short_config, optim=replace(short_config.optim, ema=0.9)))
    register_run(trained.run_id, name="tiny", alias="best")
    best = catalog.best(trained.folder)
    assert best is not None
    weights = read_version("models:/tiny@best")[0].state_dict()
    for averaged in (True, False):
        model = build_model(trained.config.model, 4)
        checkpoint_state.load_weights(best[0], model, averaged=averaged)
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items()) is averaged
    assert read_version("models:/tiny@best")[1].ema == 0.9
    assert find_version(trained.client, "models:/tiny@best").tags["ema"] == "0.9"
    found = evaluate("models:/tiny@best", trained.config.data.val)
    assert found.score.metrics == pytest.approx(best[1], abs=1e-6)
