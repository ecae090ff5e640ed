"""Links to MLflow's pages."""

import pytest

from pipeline.tracking.pages.links import run_link, ui_address


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("http://tracking:5000", "http://tracking:5000/"),
        ("https://host/mlflow/", "https://host/mlflow/"),
        ("https://token@host?secret=x", "https://host/"),
        ("sqlite:////home/mlflow.db", "http://127.0.0.1:5000/"),
        ("postgresql://u:p@db/x", "http://127.0.0.1:5000/"),
    ],
)
def test_the_address_of_the_ui_has_no_secret(uri: str, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert ui_address() == address


def test_a_link_leads_to_the_run_and_not_to_pages_of_language_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert run_link("1", "ab") == "http://tracking:5000/#/experiments/1/runs/ab?workflowType=machine_learning"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///x.db")
    assert run_link("1", "ab").endswith("(while `detr ui` runs)")
