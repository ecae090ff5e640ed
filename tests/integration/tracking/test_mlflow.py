"""Runs and events in a real MLflow store on SQLite."""

import json
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from pipeline.config import RunConfig, from_json
from pipeline.errors import TrackingError
from pipeline.tracking import mlflow_runs, ui
from pipeline.tracking.events import Event
from pipeline.tracking.mlflow_client import connect, holds_secret, without_secret
from pipeline.tracking.mlflow_runs import (
    CONFIG_ARTIFACT,
    create_run,
    find_run,
    find_runs,
    read_config,
    set_final_status,
)
from pipeline.tracking.mlflow_sender import EventSender
from pipeline.tracking.pages.data import data_of_run, data_set
from pipeline.tracking.pages.experiment import TAG_VIEW
from pipeline.tracking.pages.parameters import parameters
from pipeline.tracking.pages.writer import DescriptionWriter
from pipeline.tracking.provenance import code_commit
from pipeline.tracking.spool import SpoolTracker
from pipeline.tracking.tags import TAG_COMMIT, TAG_DATA_WAIT, TAG_FOLDER, TAG_NOTE
from shards.dataset.manifest import load_manifest


@pytest.fixture
def client(store: str) -> MlflowClient:
    return connect()


def created(client: MlflowClient, config: RunConfig, name: str = "") -> str:
    train, val = load_manifest(config.data.train), load_manifest(config.data.val)
    datasets = {"training": data_set(train), "validation": data_set(val)}
    named = replace(config, track=replace(config.track, run_name=name))
    return create_run(client, named, datasets, {TAG_FOLDER: "/runs/one", "detr.train_digest": train.digest})


def rows(store: str) -> dict[str, int]:
    """Return the number of rows of each table of the store."""
    with sqlite3.connect(store.removeprefix("sqlite:///")) as database:
        names = [name for (name,) in database.execute("select name from sqlite_master where type = 'table'")]
        return {name: database.execute(f"select count(*) from {name}").fetchone()[0] for name in names}


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_run_from_before_evaluate_batching_keeps_padded_batches(client: MlflowClient, tiny_config: RunConfig) -> None:
    run_id = created(client, tiny_config)
    stored = msgspec.json.decode(read_config(client, run_id))
    del stored["evaluate"]["batching"]
    client.log_text(run_id, msgspec.json.encode(stored).decode(), CONFIG_ARTIFACT)
    assert from_json(read_config(client, run_id)).evaluate.batching == "padded"


def test_a_run_has_its_configuration_code_and_data(client: MlflowClient, tiny_config: RunConfig) -> None:
    run = client.get_run(created(client, tiny_config))
    assert run.data.params == parameters(tiny_config)
    assert run.data.tags[TAG_COMMIT] == code_commit()
    assert run.data.tags["mlflow.source.name"] == "detr train tiny"
    assert run.info.run_name == "tiny"
    assert from_json(read_config(client, run.info.run_id)) == tiny_config
    digests = {
        {tag.key: tag.value for tag in entry.tags}["mlflow.data.context"]: entry.dataset.digest
        for entry in run.inputs.dataset_inputs
    }
    assert digests == {
        "training": load_manifest(tiny_config.data.train).digest[:36],
        "validation": load_manifest(tiny_config.data.val).digest[:36],
    }
    assert list(data_of_run(run)) == [
        ("training", data_set(load_manifest(tiny_config.data.train))),
        ("validation", data_set(load_manifest(tiny_config.data.val))),
    ]


def test_artifacts_are_kept_beside_the_database(client: MlflowClient, tiny_config: RunConfig, store: str) -> None:
    run_id = created(client, tiny_config)
    beside = Path(store.removeprefix("sqlite:///")).parent / "mlartifacts" / "detr"
    assert (beside / run_id / "artifacts" / CONFIG_ARTIFACT).is_file()


def test_a_run_is_found_by_id_start_of_id_and_name(client: MlflowClient, tiny_config: RunConfig) -> None:
    ids = [created(client, tiny_config, name) for name in ("first", "second", "second")]

    def found(word: str) -> str:
        run: Run = find_run(client, word)
        return str(run.info.run_id)

    assert [found(run_id) for run_id in ids] == ids
    assert [found(run_id[:8]) for run_id in ids] == ids
    assert found("first") == ids[0]
    assert found("second") == ids[2]  # the newest
    assert [run.info.run_id for run in find_runs(client)] == ids[::-1]
    assert find_runs(client, "another experiment") == []


def test_an_unknown_run_is_one_line_with_known_names(client: MlflowClient, tiny_config: RunConfig) -> None:
    created(client, tiny_config, "mine")
    for word in ("yours", "ffff", "", 'it\'s "quoted"', "%"):
        with pytest.raises(TrackingError, match=r"there is no run .*newest: mine") as caught:
            find_run(client, word)
        assert "\n" not in str(caught.value)


def test_runs_of_other_programs_are_not_listed(client: MlflowClient, tiny_config: RunConfig) -> None:
    experiment = client.create_experiment("other")
    foreign = client.create_run(experiment).info.run_id
    assert find_runs(client) == []
    with pytest.raises(TrackingError, match=r"has no config\.json .*expected a run of `detr train`"):
        read_config(client, foreign)


def test_runs_are_found_among_many_others(
    client: MlflowClient, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_runs, "_PAGE", 2)
    ids = [created(client, tiny_config, name) for name in ("first", "second", "third", "fourth")]
    experiment = client.get_run(ids[0]).info.experiment_id
    for _ in range(3):
        client.create_run(experiment)
    assert [run.info.run_id for run in find_runs(client, limit=3)] == ids[:0:-1]
    assert [find_run(client, word).info.run_id for word in ("first", ids[1][:8], ids[2])] == ids[:3]


def test_a_foreign_run_is_not_found_by_its_id(client: MlflowClient) -> None:
    foreign = client.create_run(client.create_experiment("other")).info.run_id
    with pytest.raises(TrackingError, match="there is no run"):
        find_run(client, foreign)


def test_a_deleted_experiment_is_one_line(client: MlflowClient, tiny_config: RunConfig) -> None:
    client.delete_experiment(client.create_experiment("detr"))
    with pytest.raises(TrackingError, match="the experiment 'detr' is deleted"):
        created(client, tiny_config)


@pytest.mark.parametrize(
    "uri",
    [
        "http://ada:hunter2@127.0.0.1:9",
        "https://ada:hunter2@127.0.0.1:9",
        "postgresql://ada:hunter2@127.0.0.1:9/db",
        "postgresql://ada:a/hunter2@127.0.0.1:9/db",
        "postgresql://127.0.0.1:9/db?user=ada&password=hunter2",
    ],
)
def test_an_error_never_shows_a_password(uri: str, monkeypatch: pytest.MonkeyPatch, store: str) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match=r"does not answer .*check MLFLOW_TRACKING_URI") as caught:
        connect(uri)
    assert "hunter2" not in str(caught.value)
    assert "127.0.0.1:9" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "shown", "secret"),
    [
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db", False),
        ("http://tracking:5000", "http://tracking:5000", False),
        ("postgresql://u:a/b@db/x", "postgresql://***@db/x", True),
        ("postgresql://u:a@b@db/x", "postgresql://***@db/x", True),
        ("postgresql://u:a?b@db/x", "postgresql://***", True),
        ("postgresql://db/x?user=u&password=p", "postgresql://db/x?***", True),
        ("postgresql://db/x?sslmode=require", "postgresql://db/x?***", False),
        ("mssql+pyodbc:///?odbc_connect=PWD%3Dp", "mssql+pyodbc:///?***", True),
        ("databricks", "databricks", False),
    ],
)
def test_secrets_of_an_address_are_masked(uri: str, shown: str, secret: bool) -> None:
    assert (without_secret(uri), holds_secret(uri)) == (shown, secret)


def test_the_ui_server_gets_the_store_by_its_environment(monkeypatch: pytest.MonkeyPatch, store: str) -> None:
    started: dict[str, Any] = {}

    class Ended:
        def __init__(self, command: list[str], *, env: dict[str, str], **_: object) -> None:
            started.update(command=command, env=env)

        def wait(self) -> int:
            return 1

    monkeypatch.setattr(ui.subprocess, "Popen", Ended)
    with pytest.raises(TrackingError, match="ended with status 1"):
        ui.serve_ui("127.0.0.1", 0)
    assert not any("sqlite" in word for word in started["command"])
    assert started["env"]["MLFLOW_BACKEND_STORE_URI"] == store


@pytest.mark.parametrize("uri", ["gopher://host", "sqlite:///{junk}"])
def test_an_address_without_a_store_is_one_line(uri: str, tmp_path: Path, store: str) -> None:
    (tmp_path / "junk").write_text("not a database " * 20)
    with pytest.raises(TrackingError, match=r"does not answer .*check MLFLOW_TRACKING_URI") as caught:
        connect(uri.format(junk=tmp_path / "junk"))
    assert "\n" not in str(caught.value)


def spooled(folder: Path) -> list[Event]:
    """Return one event of every kind, with pictures in the folder."""
    taken: list[Event] = []
    tracker = SpoolTracker(folder, taken.extend, interval_s=0.01)
    tracker.tags({"detr.phase": "training"})
    for step in (1, 2, 3):
        tracker.metrics({"train/loss": 3.0 - step, "optim/lr": 0.1}, step)
    tracker.picture("detections/0", Image.new("RGB", (8, 6), "red"), 3)
    tracker.checkpoint("/runs/one/checkpoints/step-00000003", 3, {"val/AP": 0.25, "val/APs": -1.0})
    tracker.table("per_class_ap.json", {"name": ["cat", "dog"], "AP": [0.5, 0.0]}, 3)
    tracker.file("images/newest.png", b"the newest", 3)
    tracker.tags({"detr.phase": "evaluating"})
    tracker.close()
    return taken


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


def test_an_experiment_explains_itself_and_has_a_view_of_its_runs(client: MlflowClient, tiny_config: RunConfig) -> None:
    experiment_id = client.get_run(created(client, tiny_config)).info.experiment_id
    tags = client.get_experiment(experiment_id).tags
    view = json.loads(tags[TAG_VIEW])
    assert "metrics.`val/AP`" in json.loads(view["state"])["selectedColumns"]
    assert f"#/experiments/{experiment_id}/runs?" in tags[TAG_NOTE]
    client.set_experiment_tag(experiment_id, TAG_NOTE, "mine")
    created(client, tiny_config)
    assert client.get_experiment(experiment_id).tags == tags | {TAG_NOTE: "mine"}


def test_the_end_of_a_run_is_in_its_description(
    client: MlflowClient, tiny_config: RunConfig, store: str, tmp_path: Path
) -> None:
    run_id = created(client, tiny_config)
    EventSender(store, run_id, tmp_path / "spool")(spooled(tmp_path / "spool"))
    client.log_metric(run_id, "evaluation/epoch", 1.5, step=3)
    assert set_final_status(client, run_id, "finished", "FINISHED", print)
    note = client.get_run(run_id).data.tags[TAG_NOTE]
    assert "**Finished**; ended " in note.partition("\n")[0]
    assert "| **newest and best** | 0.250 | 1.5 | 3 |" in note
    assert "| recipe | `tiny`" in note


def test_a_description_is_rewritten_when_something_has_happened(client: MlflowClient, tiny_config: RunConfig) -> None:
    run_id = created(client, tiny_config)
    read: list[int] = []

    def read_once() -> RunConfig:
        read.append(1)
        return tiny_config

    describe = DescriptionWriter(client, read_once)
    for _ in range(3):
        describe(client.get_run(run_id))
    client.set_tag(run_id, TAG_NOTE, "old")
    describe(client.get_run(run_id))
    assert client.get_run(run_id).data.tags[TAG_NOTE] == "old"
    client.set_tag(run_id, TAG_DATA_WAIT, "slow")
    describe(client.get_run(run_id))
    assert "- slow" in client.get_run(run_id).data.tags[TAG_NOTE]
    assert read == [1]
