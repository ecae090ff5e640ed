"""Files of a version that cannot be fetched."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest

from pipeline.errors import RegistryError
from pipeline.registry.versions import resolve

CARD = "artifacts/detector/card.json"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([CARD], "cannot be fetched (No space left on device)"),
        (["MLmodel"], "holds no card.json"),
        ([], "cannot be fetched (No space left on device)"),
    ],
    ids=["card", "no card", "no files"],
)
def test_a_failed_download_names_its_problem_if_the_card_is_there(
    files: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise OSError("No space left on device")

    def listed(artifact_uri: str) -> list[Any]:
        folder = artifact_uri.removeprefix("models:/m/1").strip("/")
        return [SimpleNamespace(path=path) for path in files if path.startswith(folder)]

    monkeypatch.setattr("pipeline.registry.versions.connect", lambda: None)
    version = SimpleNamespace(name="m", version="1")
    monkeypatch.setattr("pipeline.registry.versions.find_version", lambda client, uri: version)
    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", download)
    monkeypatch.setattr(mlflow.artifacts, "list_artifacts", listed)
    with pytest.raises(RegistryError) as caught:
        resolve("models:/m@best", tmp_path)
    assert message in str(caught.value)
