"""Reports of workers that wait for resources, in a real store."""

import time
from collections.abc import Callable
from functools import partial

import pytest
import ray
from mlflow import MlflowClient

from pipeline.cluster.notes import attempts
from pipeline.cluster.notes.notes import Notes
from pipeline.cluster.resources import describe_resources, report_pending_workers
from pipeline.config import ClusterConfig
from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.tags import TAG_PENDING_WORKERS

quick_report = partial(report_pending_workers, patience_s=0.3, look_s=0.05)


@pytest.fixture
def client(store: str) -> MlflowClient:
    return connect()


@pytest.fixture
def run_id(client: MlflowClient) -> str:
    return str(client.create_run(client.create_experiment("waits")).info.run_id)


@pytest.fixture
def tag(client: MlflowClient, run_id: str) -> Callable[[], str | None]:
    return lambda: client.get_run(run_id).data.tags.get(TAG_PENDING_WORKERS)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_text_names_the_resources_needed_and_present(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 5.0, "GPU": 4.0})
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0})
    text = describe_resources(ClusterConfig(workers=8, min_workers=3, cpus_per_worker=2), gpu=True)
    present = "the cluster has 5 CPU (1 free) and 4 GPU (0 free);"
    assert f"at least 3 workers need 6 CPU and 3 GPU in all, and {present}" in text
    text = describe_resources(ClusterConfig(workers=1), gpu=False)
    assert ": 1 worker needs 1 CPU in all, and the cluster has 5 CPU (1 free);" in text


def test_a_wait_is_reported_and_cleared_when_workers_run(
    run_id: str, notes: Notes, tag: Callable[[], str | None]
) -> None:
    with quick_report(run_id, notes, lambda: "no CPUs"):
        until(lambda: tag() == "no CPUs")
        attempts.start_attempt(notes, 2)
        until(lambda: tag() is None)
        attempts.record_end(notes, "worker 1 died")
        until(lambda: tag() == "no CPUs")
    until(lambda: tag() is None)  # a finished run waits for nothing


def test_a_wait_is_reported_once_although_free_resources_change(
    run_id: str, notes: Notes, tag: Callable[[], str | None]
) -> None:
    free = iter(range(1000))
    with quick_report(run_id, notes, lambda: f"{next(free)} free"):
        until(lambda: tag() == "0 free")
        time.sleep(0.5)
        assert tag() == "0 free"


def test_workers_that_start_or_run_are_not_reported(run_id: str, notes: Notes, tag: Callable[[], str | None]) -> None:
    asked = []
    attempts.start_attempt(notes, 2)
    with quick_report(run_id, notes, lambda: str(asked.append(1))):
        time.sleep(1)
        attempts.request_handover(notes)
        attempts.record_end(notes, "there are resources for 3 workers", wanted=True)
        time.sleep(1)
    with report_pending_workers(run_id, notes, lambda: str(asked.append(1)), patience_s=60, look_s=0.05):
        time.sleep(1)
    assert not asked
    assert tag() is None


def test_a_ray_or_store_that_does_not_answer_is_asked_again(
    run_id: str, notes: Notes, tag: Callable[[], str | None]
) -> None:
    answers = iter([ConnectionError("the head is busy"), "no CPUs"])

    def why() -> str:
        answer = next(answers, "no CPUs")
        if isinstance(answer, Exception):
            raise answer
        return answer

    with quick_report(run_id, notes, why):
        until(lambda: tag() == "no CPUs")
