"""The version on the page of a logged model, which an MLflow server lists with its number as a number."""

import json
from types import SimpleNamespace
from typing import Any

from pipeline.registry.logged_models import list_version


def test_a_version_that_the_server_has_listed_is_listed_once() -> None:
    tags = {"mlflow.modelVersions": json.dumps([{"name": "it", "version": 1}])}
    client: Any = SimpleNamespace(
        get_logged_model=lambda _: SimpleNamespace(tags=tags), set_logged_model_tags=lambda _, new: tags.update(new)
    )
    list_version(client, "m-1", "it", "1")
    assert json.loads(tags["mlflow.modelVersions"]) == [{"name": "it", "version": 1}]
    list_version(client, "m-1", "it", "2")
    assert json.loads(tags["mlflow.modelVersions"])[1] == {"name": "it", "version": "2"}
