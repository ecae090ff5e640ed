"""What follows the registration of a version is a remark: no failure of it reaches a run that is trained."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.registry.against_holder import holder_if_known, note_change
from pipeline.registry.kept_detections import store_of_checkpoint
from pipeline.registry.pages import write_pages


class Broken:
    """Client of a store whose artifacts fail with an error of their own library."""

    def __getattr__(self, name: str) -> Any:
        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("no credentials")

        return fail


REMARKS: dict[str, Callable[[Any], Any]] = {
    "holder": lambda client: holder_if_known(client, "m", "best"),
    "change": lambda client: note_change(client, SimpleNamespace(version="1"), "m", "2", "best"),
    "page": lambda client: write_pages(client, "m", "2"),
    "detections": lambda client: store_of_checkpoint(client, "r", 3, "checkpoint"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("remark", REMARKS)
def test_a_remark_that_fails_is_only_logged(
    remark: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = SimpleNamespace(digest="d")
    monkeypatch.setattr("pipeline.registry.kept_detections.read_beside", lambda checkpoint: kept)
    assert not REMARKS[remark](Broken())
    assert caplog.text.count("no credentials") == 1


def test_a_step_that_is_no_number_is_only_logged(caplog: pytest.LogCaptureFixture) -> None:
    version = SimpleNamespace(version="2", run_id="r", tags={"step": "last", "val_digest": "d"})
    client: Any = SimpleNamespace(get_model_version=lambda *_: version)
    assert note_change(client, SimpleNamespace(version="1", run_id="r", tags={"step": "?"}), "m", "2", "best") == ""
    assert "is not compared with @best" in caplog.text
