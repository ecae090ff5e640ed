"""A sweep's command before its trials: MLflow that does not answer."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config import RunConfig
from pipeline.errors import Postponed, TrackingAway
from pipeline.sweep import sweep
from pipeline.sweep.record import open_record, write_sweep
from pipeline.sweep.sweep import SweepPlan, run_sweep
from pipeline.sweep.trials import Trial


@pytest.mark.parametrize(("known", "error"), [(True, Postponed), (False, TrackingAway)])
def test_a_sweep_that_mlflow_knows_waits_for_it_and_a_new_one_may_have_a_wrong_address(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool, error: type[Exception]
) -> None:
    def away() -> None:
        raise TrackingAway("the MLflow store does not answer")

    monkeypatch.setattr(sweep, "connect", away)
    monkeypatch.setattr(sweep, "_check_data", lambda plan, say: None)
    tuning: Any = SimpleNamespace(metric="val/AP", mode="max")
    trials = [Trial("s-1", ("--seed", "1"), {"--seed": "1"})]
    plan = SweepPlan("s", "demo", trials, [replace(tiny_config, storage=str(tmp_path))], tuning)
    if known:
        folder = tmp_path / "s"
        write_sweep(folder, open_record(folder, "s", "demo", "val/AP", "max", trials).but(run_id="0123"))
    with pytest.raises(error) as caught:
        run_sweep(plan, print)
    assert type(caught.value) is error
