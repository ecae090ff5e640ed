"""Upload of a version's files, which a sender that removes logged models of pruned checkpoints must not cross."""

from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.registry import publish as module
from pipeline.registry.publish import publish
from pipeline.tracking.tags import TAG_FILES


class Store:
    """Client of a store with a logged model, whose upload fails if asked."""

    def __init__(self, fails: bool = False) -> None:
        self.tags: dict[str, str] = {}
        self.uploaded: list[str | None] = []
        self.fails = fails

    def set_logged_model_tags(self, _: str, tags: dict[str, str]) -> None:
        self.tags |= tags

    def log_model_artifacts(self, *_: Any) -> None:
        self.uploaded.append(self.tags.get(TAG_FILES))
        if self.fails:
            raise OSError("cut off")

    def search_model_versions(self, _: str) -> list[Any]:
        return []

    def set_registered_model_alias(self, *_: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("write_folder", "write_mlflow_model", "list_version"):
        monkeypatch.setattr(module, name, lambda *_: None)
    monkeypatch.setattr(module, "_tags", lambda card: {})
    monkeypatch.setattr(module, "_create_version", lambda *_: SimpleNamespace(version="1"))
    monkeypatch.setattr(
        module,
        "logged_model",
        lambda client, card, tags: SimpleNamespace(model_id="m-1", tags=dict(client.tags), status="READY"),
    )


def published(store: Any) -> None:
    card: Any = SimpleNamespace(run_id="r", step=3)
    publish(store, None, card, name="m", alias="best", retry_command="again")  # type: ignore[arg-type]


def test_a_model_is_marked_before_its_files_are_uploaded() -> None:
    store = Store()
    published(store)
    assert store.uploaded == ["uploading"]
    assert store.tags[TAG_FILES] == "weights, card, code"


def test_an_upload_that_broke_off_is_repeated_and_a_whole_one_is_not() -> None:
    store = Store(fails=True)
    with pytest.raises(Exception, match="cut off"):
        published(store)
    store.fails = False
    published(store)
    published(store)
    assert len(store.uploaded) == 2
