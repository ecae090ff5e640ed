"""Pages of a registered version in a real MLflow store, and the same as text."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from jobs.commands.models import evaluate, lineage, show_version
from pipeline.checkpoint import catalog
from pipeline.config import RunConfig
from pipeline.registry.facts import model_id_of
from pipeline.registry.registration import register_run
from pipeline.registry.versions import find_version
from pipeline.tracking.events import Event, now_ms
from pipeline.tracking.mlflow_client import tracking_uri
from pipeline.tracking.mlflow_sender import EventSender
from pipeline.tracking.tags import TAG_MODEL_VERSIONS, TAG_NOTE
from shards.dataset.manifest import load_manifest
from tests.support.registry import Trained, train_in


@pytest.fixture(scope="module")
def trained(shared_store: str, short_config: RunConfig) -> Trained:
    """A registered run."""
    found = train_in(Path(shared_store.removeprefix("sqlite:///")).parent, short_config)
    register_run(found.run_id, name="tiny", alias="best")
    return found


def logged_model(trained: Trained, uri: str = "models:/tiny/1") -> Any:
    return trained.client.get_logged_model(model_id_of(find_version(trained.client, uri)))


def models_of(trained: Trained, run_id: str) -> list[Any]:
    experiment = trained.client.get_run(run_id).info.experiment_id
    return list(trained.client.search_logged_models([experiment], f"source_run_id = '{run_id}'"))


def test_a_version_is_the_logged_model_of_its_checkpoint_with_metrics_and_data(trained: Trained) -> None:
    best = catalog.best(trained.folder)
    assert best is not None
    model, val = logged_model(trained), load_manifest(trained.config.data.val)
    assert [found.model_id for found in models_of(trained, trained.run_id)] == [model.model_id]
    own = {metric.key: metric.value for metric in model.metrics if metric.run_id == trained.run_id}
    assert own == {f"val/{name}": value for name, value in best[1].items() if value >= 0}
    used = {(metric.dataset_name, metric.dataset_digest) for metric in model.metrics if metric.run_id == trained.run_id}
    assert used == {(val.name, val.digest[:36])}
    assert msgspec.json.decode(model.tags[TAG_MODEL_VERSIONS]) == [{"name": "tiny", "version": "1"}]


def test_the_page_of_a_version_has_figures_data_code_and_commands(trained: Trained) -> None:
    text, val = find_version(trained.client, "models:/tiny/1").description, load_manifest(trained.config.data.val)
    for wanted in (
        f"| **{val.name}** | 0.",
        f"digest `{val.digest[:12]}`; made from annotations `{val.source_digest[:12]}`",
        f"/runs/{trained.run_id}?workflowType=machine_learning",
        "code | `abc123`",
        f"detr evaluate models:/tiny/1 --data {trained.config.data.val}",
        f"detr resume {trained.run_id[:8]} --epochs",
    ):
        assert wanted in text.replace(", made", "; made").replace("&nbsp;", ""), wanted
    assert logged_model(trained).tags[TAG_NOTE] == text
    assert "`detr lineage models:/tiny/VERSION`" in trained.client.get_registered_model("tiny").description


def test_an_evaluation_is_a_run_below_the_version_s_and_on_its_page(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    other = trained.config.data.train
    evaluate(["models:/tiny@best", "--data", other])
    link = capsys.readouterr().err
    manifest, model = load_manifest(other), logged_model(trained)
    (run_id,) = {metric.run_id for metric in model.metrics} - {trained.run_id}
    assert f"/runs/{run_id}?" in link
    run = trained.client.get_run(run_id)
    assert run.data.tags["mlflow.parentRunId"] == trained.run_id
    assert run.info.status == "FINISHED"
    assert [entry.dataset.digest for entry in run.inputs.dataset_inputs] == [manifest.digest[:36]]
    found = {metric.key: metric.value for metric in model.metrics if metric.run_id == run_id}
    assert found == run.data.metrics
    assert "evaluate/AP" in found
    assert {entry.path for entry in trained.client.list_artifacts(run_id)} >= {"per_class_ap.json", "detections.png"}
    assert (
        f"[{manifest.name}](#/experiments/1/runs/{run_id}" in find_version(trained.client, "models:/tiny/1").description
    )
    show_version(["models:/tiny@best"])
    shown = capsys.readouterr().out
    assert shown.startswith("models:/tiny/1 @best: AP 0.")
    assert f"metric  {load_manifest(trained.config.data.val).name}  {manifest.name} evaluated" in shown


def test_the_lineage_goes_down_to_the_annotations_of_the_first_version(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = train_in(tmp_path, replace(trained.config, initial="models:/tiny/1", recipe="tuned"))
    register_run(tuned.run_id, name="tuned", alias="best")
    lineage(["models:/tuned@best"])
    first, second = (" ".join(block.split()) for block in capsys.readouterr().out.split("\n\n"))
    assert first.startswith("models:/tuned/1 @best")
    assert "started from models:/tiny/1" in first
    assert second.startswith("models:/tiny/1 @best")
    train = load_manifest(trained.config.data.train)
    assert f"annotations sha256 {train.source_digest}" in second
    assert f"{train.images:,} images, {train.annotations:,} objects, {train.num_classes} classes" in second
    assert all(f"{category.name} " in second for category in train.categories)


def test_the_model_of_a_deleted_checkpoint_goes_from_the_store_and_its_curve_stays(trained: Trained) -> None:
    gone = str(trained.folder / "checkpoints" / "step-00000007")
    event = Event(kind="checkpoint", time_ms=now_ms(), step=7, name=gone, values={"val/AP": 0.25})
    EventSender(tracking_uri(), trained.run_id, Path(), any_order=True)([event])
    assert [model.model_id for model in models_of(trained, trained.run_id)] == [logged_model(trained).model_id]
    assert [point.step for point in trained.client.get_metric_history(trained.run_id, "val/AP")] == [1, 7]


def test_an_event_that_comes_after_the_registration_adds_what_is_missing(trained: Trained) -> None:
    model = logged_model(trained)
    figures = {"val/AP": 0.5, "evaluation/seconds": 3.0}
    event = Event(kind="checkpoint", time_ms=now_ms(), step=1, name=model.tags["checkpoint_uri"], values=figures)
    EventSender(tracking_uri(), trained.run_id, Path(), any_order=True)([event])
    history = trained.client.get_metric_history
    assert [point.value for point in history(trained.run_id, "evaluation/seconds")] == [3.0]
    assert 0.5 not in [point.value for point in history(trained.run_id, "val/AP")]
    assert len(models_of(trained, trained.run_id)) == 1
