"""Refusal of a cluster that does not answer, and of one that would be sent a password; settings of this machine."""

import os
from collections.abc import Callable
from functools import partial

import pytest
import ray

from pipeline.cluster import launch
from pipeline.cluster.launch import connecting
from pipeline.cluster.ray_session import join_cluster, start_local_ray
from pipeline.config import RunConfig
from pipeline.errors import PipelineError, RunConfigError
from pipeline.recipes import RECIPES
from pipeline.tracking.server.address import _Moved


@pytest.mark.parametrize(
    ("connect", "message"),
    [
        (
            partial(join_cluster, "10.0.0.7:6379", verbose=False),
            r"^no Ray cluster answers at 10\.0\.0\.7:6379 \(too late\); expected .*: check --address$",
        ),
        (
            partial(start_local_ray, RECIPES["demo"], verbose=False),
            r"^Ray does not start on this machine \(too late\); expected .*--verbose.*--address",
        ),
    ],
)
def test_a_ray_that_does_not_answer_is_one_line(
    monkeypatch: pytest.MonkeyPatch, connect: Callable[[], None], message: str
) -> None:
    def init(**_: object) -> None:
        raise ConnectionError("too late\nand more")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(PipelineError, match=message) as caught:
        connect()
    assert "\n" not in str(caught.value)


def test_a_password_in_mlflow_s_address_is_refused_for_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Moved, "login", False)
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ada:hunter2@127.0.0.1:9")
    with (
        pytest.raises(RunConfigError, match=r"MLFLOW_TRACKING_USERNAME .* on the cluster's nodes") as caught,
        connecting(RunConfig(), address="127.0.0.1:9", verbose=False),
    ):
        pass
    assert "hunter2" not in str(caught.value)


def test_what_is_set_for_this_machine_does_not_reach_a_cluster_that_is_joined_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Unconnected:
        def __init__(self, *_: object) -> None:
            pass

        def close(self) -> None:
            pass

    monkeypatch.setattr(launch, "Connection", Unconnected)
    monkeypatch.setattr(launch, "lock_local_ray", lambda: None)
    monkeypatch.setattr(launch, "authenticate", lambda: None)
    for name in ("RAY_ADDRESS", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "RAY_TRAIN_V2_ENABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "7")

    def watcher(address: str | None) -> tuple[str | None, str]:
        with connecting(RunConfig(), address=address, verbose=True):
            return os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"), os.environ[
                "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
            ]

    assert watcher(None) == ("0", "7")
    assert watcher("127.0.0.1:9") == (None, "7")
