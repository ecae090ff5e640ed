"""Events in a real MLflow store on SQLite: all of them, once, whoever sends them."""

import json
import sqlite3
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from pipeline.config import RunConfig
from pipeline.tracking.events import Event
from pipeline.tracking.mlflow_sender import EventSender
from pipeline.tracking.tags import TAG_DATA_WAIT
from tests.support.created import created, spooled


def rows(store: str) -> dict[str, int]:
    """Return the number of rows of each table of the store."""
    with sqlite3.connect(store.removeprefix("sqlite:///")) as database:
        names = [name for (name,) in database.execute("select name from sqlite_master where type = 'table'")]
        return {name: database.execute(f"select count(*) from {name}").fetchone()[0] for name in names}


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_all_events_are_in_the_store(client: MlflowClient, tiny_config: RunConfig, store: str, tmp_path: Path) -> None:
    run_id = created(client, tiny_config)
    EventSender(store, run_id, tmp_path / "spool")(spooled(tmp_path / "spool"))
    run = client.get_run(run_id)
    assert [(point.step, point.value) for point in client.get_metric_history(run_id, "train/loss")] == [
        (1, 2.0),
        (2, 1.0),
        (3, 0.0),
    ]
    assert run.data.metrics["val/AP"] == 0.25
    assert run.data.tags["detr.phase"] == "evaluating"
    newest = Path(client.download_artifacts(run_id, "images/newest.png", str(tmp_path)))
    assert newest.read_bytes() == b"the newest"
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "per_class_ap.json", "type": "table"}]
    table = json.loads(Path(client.download_artifacts(run_id, "per_class_ap.json", str(tmp_path))).read_text())
    assert table == {"columns": ["name", "AP"], "data": [["cat", 0.5], ["dog", 0.0]]}
    pictures = [file.path for file in client.list_artifacts(run_id, "images")]
    (picture,) = [path for path in pictures if path.endswith(".png") and "newest" not in path]
    with Image.open(client.download_artifacts(run_id, picture, str(tmp_path))) as image:
        assert (image.size, image.getpixel((0, 0))[:3]) == ((8, 6), (255, 0, 0))
    (model,) = client.search_logged_models([run.info.experiment_id])
    assert model.tags["checkpoint_uri"] == "/runs/one/checkpoints/step-00000003"
    assert {metric.key: metric.value for metric in model.metrics} == {"val/AP": 0.25, "val/APs": -1.0}
    assert (model.source_run_id, model.status) == (run_id, "READY")
    assert not [*(tmp_path / "spool").glob("*.png"), *(tmp_path / "spool").glob("*.content")]


def test_sending_events_again_adds_nothing(
    client: MlflowClient, tiny_config: RunConfig, store: str, tmp_path: Path
) -> None:
    run_id = created(client, tiny_config)
    events = spooled(tmp_path / "spool")
    EventSender(store, run_id, tmp_path / "spool")(events)
    before = rows(store), files(tmp_path / "mlartifacts")
    for _ in range(2):
        EventSender(store, run_id, tmp_path / "spool")(events)
    assert (rows(store), files(tmp_path / "mlartifacts")) == before


@pytest.mark.parametrize("call", ["log_outputs", "log_batch", "finalize_logged_model", "log_dict", "log_image"])
def test_a_sender_completes_what_a_dead_one_has_started(
    client: MlflowClient,
    tiny_config: RunConfig,
    store: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
) -> None:
    run_id = created(client, tiny_config)
    events = spooled(tmp_path / "spool")

    def dies(*_: object, **__: object) -> None:
        raise ConnectionError

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, call, dies)
        with pytest.raises(ConnectionError):
            EventSender(store, run_id, tmp_path / "spool")(events)
    EventSender(store, run_id, tmp_path / "spool")(events)
    run = client.get_run(run_id)
    (model,) = client.search_logged_models([run.info.experiment_id])
    assert {metric.key: metric.value for metric in model.metrics} == {"val/AP": 0.25, "val/APs": -1.0}
    assert model.status == "READY"
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
    assert [point.value for point in client.get_metric_history(run_id, "val/AP")] == [0.25]
    assert client.list_artifacts(run_id, "images")


def test_more_points_than_fit_one_request_arrive(
    client: MlflowClient, tiny_config: RunConfig, store: str, tmp_path: Path
) -> None:
    run_id = created(client, tiny_config)
    events = [Event("metrics", 1, step=step, values={"train/a": 1.0, "train/b": 2.0}) for step in range(700)]
    EventSender(store, run_id, tmp_path)(events)
    assert len(client.get_metric_history(run_id, "train/b")) == 700


def test_a_picture_that_cannot_be_decoded_is_dropped(
    client: MlflowClient, tiny_config: RunConfig, store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = created(client, tiny_config)
    events = spooled(tmp_path / "spool")
    (picture,) = (tmp_path / "spool").glob("*.png")
    picture.write_bytes(picture.read_bytes()[:50])
    EventSender(store, run_id, tmp_path / "spool")(events)
    assert client.get_run(run_id).data.tags["detr.phase"] == "evaluating"
    assert [file.path for file in client.list_artifacts(run_id, "images")] == ["images/newest.png"]
    assert "is dropped: it cannot be decoded" in caplog.text


def test_a_warning_that_has_passed_is_no_tag_any_more(
    client: MlflowClient, tiny_config: RunConfig, store: str, tmp_path: Path
) -> None:
    run_id = created(client, tiny_config)
    send = EventSender(store, run_id, tmp_path)
    send([Event("tags", 1, tags={TAG_DATA_WAIT: "slow"})])
    assert client.get_run(run_id).data.tags[TAG_DATA_WAIT] == "slow"
    for _ in range(2):
        send([Event("tags", 2, tags={TAG_DATA_WAIT: ""})])
    assert TAG_DATA_WAIT not in client.get_run(run_id).data.tags
