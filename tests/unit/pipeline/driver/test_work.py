"""Work of a driver without Ray and MLflow: what it refuses, what it sends, and the status that its errors have."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config import RunConfig
from pipeline.driver.launch import Launch
from pipeline.driver.lease import Claims, Lease
from pipeline.driver.record import new_record
from pipeline.driver.work import Work
from pipeline.errors import RunConfigError
from tests.support.checkpoints import save_small

READY: Any = SimpleNamespace(schedule=SimpleNamespace(total_steps=6))


def work_at(folder: Path, config: RunConfig, lines: list[str], client: Any = None) -> Work:
    """Return the work of a driver on a run whose workers and MLflow are not there."""
    record = new_record(folder.name, config, config, ("", "")).but(run_id="0123456789", status="running")
    return Work(folder, Launch(say=lines.append), Lease(Claims(folder), folder.name), record, client)


def test_a_new_run_takes_no_checkpoints_that_lie_in_its_store(tiny_config: RunConfig, tmp_path: Path) -> None:
    save_small(tmp_path / "it", 3)
    with pytest.raises(RunConfigError, match=r"it has a checkpoint of another run already \(step-00000003\)") as caught:
        work_at(tmp_path / "it", tiny_config, []).create(tiny_config, READY, SimpleNamespace())  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lost", ["", "taken over by process 7 on elsewhere"])
def test_what_is_left_is_sent_after_ray_by_the_lease_s_driver(
    lost: str, tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr("pipeline.driver.work.send_left", lambda *_: order.append("sent") or True)
    work = work_at(tmp_path / "it", tiny_config, [])
    work._lease.lost = lost
    cluster = SimpleNamespace(run=lambda *_, **__: order.append("ran"))
    work._run(cluster, tiny_config, lambda: order.append("disconnected"), accept_change=False)
    assert order == ["ran", "disconnected"] + ([] if lost else ["sent"])
