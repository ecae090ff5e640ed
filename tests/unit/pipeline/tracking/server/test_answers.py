"""Errors of MLflow, as a real server or none causes them, in a few words."""

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.errors import TrackingAway, TrackingError
from pipeline.tracking.mlflow_client import connect, translated_errors
from pipeline.tracking.server.answers import is_away, is_refused_login, reason
from tests.support.http_server import answering
from tests.support.ray_nodes import free_port


@pytest.fixture(autouse=True)
def _no_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")


def failure(uri: str) -> Exception:
    with pytest.raises(MlflowException) as caught:
        MlflowClient(uri).search_experiments(max_results=1)
    return caught.value


@pytest.mark.parametrize(
    ("status", "words", "away", "login"),
    [(401, "HTTP 401", False, True), (503, "HTTP 503", True, False), (500, "HTTP 500", True, False)],
)
def test_a_status_is_told_in_a_few_words(status: int, words: str, away: bool, login: bool) -> None:
    with answering(status) as server:
        error = failure(server.url)
    assert reason(error, server.url) == words
    assert (is_away(error), is_refused_login(error)) == (away, login)


def test_a_server_that_is_away_is_told_without_a_cut_sentence_or_a_password() -> None:
    uri = f"http://ada:hunter2@127.0.0.1:{free_port()}"
    error = failure(uri)
    assert reason(error, uri) == "connection refused"
    assert is_away(error)
    assert reason(failure("http://nowhere.invalid"), "http://nowhere.invalid") == "its host is unknown"


def test_a_long_message_ends_at_a_word_and_a_password_in_it_hides_it() -> None:
    long = reason(MlflowException("word " * 100), "sqlite:///x.db")
    assert long.endswith("word ...")
    assert len(long) < 210
    assert reason(MlflowException("hunter2 is wrong"), "postgresql://ada:hunter2@h/db") == "MlflowException"


def test_a_refused_login_names_the_variables_and_is_no_outage(monkeypatch: pytest.MonkeyPatch, store: str) -> None:
    with answering(401) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
        with pytest.raises(
            TrackingError, match=r"refused the login of user 'ada' .*MLFLOW_TRACKING_PASSWORD"
        ) as caught:
            connect()
        assert not isinstance(caught.value, TrackingAway)
        # In the middle of a run it leaves the run to a later try.
        with pytest.raises(TrackingAway, match="refused the login"), translated_errors():
            raise failure(server.url)
