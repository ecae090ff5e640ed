"""Logged models of checkpoints: they go with the checkpoint, unless somebody has registered them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from pipeline.tracking.mlflow_reported import CHECKPOINT
from pipeline.tracking.pages.checkpoints import drop_deleted
from pipeline.tracking.tags import TAG_CHECKPOINT, TAG_FILES, TAG_MODEL_VERSIONS


class Models:
    """Client of a store with one model for each checkpoint in a folder."""

    def __init__(self, folder: Path, steps: dict[int, dict[str, str]], present: tuple[int, ...]) -> None:
        self.deleted: list[str] = []
        self._models = []
        for step, tags in steps.items():
            uri = folder / f"step-{step:08d}"
            if step in present:
                uri.mkdir()
                (uri / "meta.json").touch()
            model = {
                "model_id": str(step),
                "name": uri.name,
                "model_type": CHECKPOINT,
                "tags": {TAG_CHECKPOINT: str(uri), **tags},
            }
            self._models.append(SimpleNamespace(**model))

    def search_logged_models(self, *_: Any, **__: Any) -> list[Any]:
        return [*self._models, SimpleNamespace(model_id="other", model_type="detector", tags={})]

    def delete_logged_model(self, model_id: str) -> None:
        self.deleted.append(model_id)


@pytest.mark.parametrize(
    ("present", "deleted"),
    [((4, 5), ["1"]), ((1, 2, 3, 4), ["5"]), ((), [])],
    ids=["pruned", "one pruned", "storage not seen"],
)
def test_models_of_deleted_checkpoints_go_and_registered_ones_stay(
    tmp_path: Path, present: tuple[int, ...], deleted: list[str]
) -> None:
    steps: dict[int, dict[str, str]] = {1: {}, 2: {TAG_FILES: "yes"}, 3: {TAG_MODEL_VERSIONS: "[]"}, 4: {}, 5: {}}
    models: Any = Models(tmp_path, steps, present)
    names = drop_deleted(models, "1", "r")
    assert models.deleted == deleted
    assert names == [f"step-0000000{step}" for step in deleted]


@pytest.mark.parametrize("refused", ["search_logged_models", "delete_logged_model"])
def test_a_user_who_may_not_delete_only_leaves_the_models(
    tmp_path: Path, refused: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    models: Any = Models(tmp_path, {1: {}, 2: {}}, (2,))

    def refuse(*_: Any, **__: Any) -> None:
        raise MlflowException("Permission denied")

    monkeypatch.setattr(models, refused, refuse)
    assert drop_deleted(models, "1", "r") == []
    assert "may still show checkpoints that are deleted (Permission denied)" in caplog.text
