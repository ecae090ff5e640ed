"""A login in MLflow's address: taken out of it, and refused where a cluster would keep it."""

import os

import pytest

from pipeline.errors import RunConfigError
from pipeline.tracking.server import address
from pipeline.tracking.server.address import refuse_uri_with_secret, tracking_uri, uri_for_workers


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Return the environment, which is as it was after the test."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", address.USERNAME, address.PASSWORD):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(address._Moved, "login", False)
    return monkeypatch


def test_a_login_moves_from_the_address_into_the_variables(variables: pytest.MonkeyPatch) -> None:
    variables.setenv("MLFLOW_TRACKING_URI", "https://ada:hunter%2F2@mlflow.example:5000/base")
    variables.setenv("MLFLOW_REGISTRY_URI", "https://ada:hunter%2F2@registry.example")
    assert tracking_uri() == "https://mlflow.example:5000/base" == os.environ["MLFLOW_TRACKING_URI"]
    assert os.environ["MLFLOW_REGISTRY_URI"] == "https://registry.example"
    assert (os.environ[address.USERNAME], os.environ[address.PASSWORD]) == ("ada", "hunter/2")


def test_another_login_of_the_registry_stays_in_its_address(variables: pytest.MonkeyPatch) -> None:
    variables.setenv("MLFLOW_TRACKING_URI", "http://ada:hunter2@127.0.0.1:9")
    variables.setenv("MLFLOW_REGISTRY_URI", "http://bob:letmein@127.0.0.1:9")
    tracking_uri()
    assert os.environ["MLFLOW_REGISTRY_URI"] == "http://bob:letmein@127.0.0.1:9"
    assert os.environ[address.USERNAME] == "ada"


@pytest.mark.parametrize(
    ("uri", "refused"),
    [
        ("http://ada:hunter2@127.0.0.1:9", True),
        ("http://token@127.0.0.1:9", True),
        ("postgresql://ada:hunter2@127.0.0.1/mlflow", True),
        ("http://127.0.0.1:9", False),
        ("sqlite:////home/ada@work/mlflow.db", False),
    ],
)
def test_an_address_with_a_secret_is_refused_for_a_cluster(
    uri: str, refused: bool, variables: pytest.MonkeyPatch
) -> None:
    variables.setenv("MLFLOW_TRACKING_URI", uri)
    if not refused:
        refuse_uri_with_secret()
        return
    with pytest.raises(RunConfigError, match="MLFLOW_TRACKING_USERNAME") as caught:
        refuse_uri_with_secret()
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "sent"),
    [
        ("http://ada:hunter2@127.0.0.1:9", "http://127.0.0.1:9"),
        ("postgresql://ada:hunter2@127.0.0.1/mlflow", ""),
        ("mysql://127.0.0.1/mlflow?password=hunter2", ""),
    ],
)
def test_workers_are_sent_no_password(uri: str, sent: str, variables: pytest.MonkeyPatch) -> None:
    variables.setenv("MLFLOW_TRACKING_URI", uri)
    assert uri_for_workers() == sent
