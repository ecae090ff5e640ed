"""What is told of workers that find no room, in a real store."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient

from pipeline import attempts, waiting
from pipeline.config import ClusterConfig
from pipeline.mlflow_store import connect
from pipeline.stopping import ask_to_yield, yielded
from pipeline.waiting import TAG_ROOM, room, telling_of_waits


def ray_with(have: dict[str, float], free: dict[str, float]) -> SimpleNamespace:
    return SimpleNamespace(cluster_resources=lambda: have, available_resources=lambda: free)


@pytest.fixture
def client(store: str, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    monkeypatch.setattr(waiting, "_PATIENCE_S", 0.3)
    monkeypatch.setattr(waiting, "_LOOK_S", 0.05)
    return connect()


@pytest.fixture
def run_id(client: MlflowClient) -> str:
    return str(client.create_run(client.create_experiment("waits")).info.run_id)


@pytest.fixture
def told(client: MlflowClient, run_id: str) -> Callable[[], str | None]:
    return lambda: client.get_run(run_id).data.tags.get(TAG_ROOM)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_it_is_told_what_the_workers_need_and_what_there_is() -> None:
    ray = ray_with({"CPU": 5.0, "GPU": 4.0}, {"CPU": 1.0})
    said = room(ray, ClusterConfig(workers=8, min_workers=3, cpus_per_worker=2), gpu=True)
    assert "at least 3 workers, 6 CPU and 3 GPU in all, and the cluster has 5 CPU (1 free) and 4 GPU (0 free)" in said
    said = room(ray, ClusterConfig(workers=1), gpu=False)
    assert "room for 1 worker, 1 CPU in all, and the cluster has 5 CPU (1 free);" in said


def test_a_wait_is_told_and_taken_back_when_workers_are_there(
    run_id: str, tmp_path: Path, told: Callable[[], str | None]
) -> None:
    with telling_of_waits(run_id, tmp_path, lambda: "no room"):
        until(lambda: told() == "no room")
        attempts.begin(tmp_path, 2)
        until(lambda: told() == "")
        attempts.end(tmp_path, "worker 1 died")
        until(lambda: told() == "no room")
    until(lambda: told() == "")  # nobody waits for a run that is over


def test_a_wait_is_told_once_though_what_is_free_changes(
    run_id: str, tmp_path: Path, told: Callable[[], str | None]
) -> None:
    free = iter(range(1000))
    with telling_of_waits(run_id, tmp_path, lambda: f"{next(free)} free"):
        until(lambda: told() == "0 free")
        time.sleep(0.5)
        assert told() == "0 free"


def test_workers_that_start_or_work_are_not_told_of(
    run_id: str, tmp_path: Path, told: Callable[[], str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    attempts.begin(tmp_path, 2)
    with telling_of_waits(run_id, tmp_path, lambda: str(asked.append(1))):
        time.sleep(1)
        ask_to_yield(tmp_path)
        attempts.end(tmp_path, "there is room for 3 workers", wanted=True)
        time.sleep(1)
    monkeypatch.setattr(waiting, "_PATIENCE_S", 60)
    yielded(tmp_path)
    with telling_of_waits(run_id, tmp_path, lambda: str(asked.append(1))):
        time.sleep(1)
    assert not asked
    assert told() is None


def test_a_ray_or_a_store_that_does_not_answer_is_asked_again(
    run_id: str, tmp_path: Path, told: Callable[[], str | None]
) -> None:
    answers = iter([ConnectionError("the head is busy"), "no room"])

    def why() -> str:
        answer = next(answers, "no room")
        if isinstance(answer, Exception):
            raise answer
        return answer

    with telling_of_waits(run_id, tmp_path, why):
        until(lambda: told() == "no room")
