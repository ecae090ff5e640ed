"""Connection to MLflow: a store that it makes is named, and a server that is away is asked nothing without a check."""

import os
from pathlib import Path
from typing import Any

import mlflow
import pytest

from pipeline.tracking.mlflow_client import connect
from tests.support.ray_nodes import free_port


class Client:
    """A client that makes the file of a store as MLflow does, without its migrations."""

    def __init__(self, tracking_uri: str) -> None:
        if tracking_uri.startswith("sqlite:///"):
            Path(tracking_uri.removeprefix("sqlite:///")).touch()

    def search_experiments(self, max_results: int) -> list[Any]:
        return []


@pytest.fixture
def _client(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow, "MlflowClient", Client)


@pytest.mark.usefixtures("_client")
def test_a_store_that_was_just_made_is_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    connect()
    assert capsys.readouterr().err == "new store ./mlflow.db\n"
    connect()
    connect(f"sqlite:///{tmp_path}/elsewhere.db")
    assert capsys.readouterr().err == f"new store {tmp_path}/elsewhere.db\n"
    connect(f"http://127.0.0.1:{free_port()}")
    assert capsys.readouterr().err == ""


def test_a_client_is_there_during_an_outage_and_mlflow_prints_no_links(store: str) -> None:
    connect(f"http://127.0.0.1:{free_port()}", check=False)
    assert os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] == "true"
