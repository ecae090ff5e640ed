"""Origin of runs in an MLflow store."""

import os

import pytest

from pipeline.tracking.mlflow_runs import origin_tags


@pytest.mark.parametrize("error", [KeyError, OSError])
def test_a_user_without_a_name_is_its_number(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error("getpwuid(): uid not found")

    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", fail)
    assert origin_tags("detr train")["mlflow.user"] == str(os.getuid())
