"""Runs, experiments and addresses of a real MLflow store on SQLite."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from pipeline.config import RunConfig, from_json
from pipeline.errors import TrackingError
from pipeline.tracking import mlflow_runs, ui
from pipeline.tracking.mlflow_client import connect, holds_secret, without_secret
from pipeline.tracking.mlflow_runs import (
    CONFIG_ARTIFACT,
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
from pipeline.tracking.tags import TAG_COMMIT, TAG_DATA_WAIT, TAG_NOTE
from shards.dataset.manifest import load_manifest
from tests.support.created import created, spooled


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
