"""Registering in a real MLflow store: once, to whom the alias goes, and what is refused."""

import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.checkpoint import catalog
from pipeline.config import RunConfig
from pipeline.errors import RegistryError, TrackingError
from pipeline.registry.publish import Registered
from pipeline.registry.registration import register, register_run
from pipeline.registry.versions import find_version, resolve
from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.mlflow_runs import create_run
from pipeline.tracking.tags import TAG_FOLDER
from shards.dataset.manifest import load_manifest
from tests.support.registry import Trained


def test_a_step_of_a_run_is_registered_once(own: Trained) -> None:
    assert register_run(own.run_id, name="tiny", alias="best") == Registered("1", True)
    assert register_run(own.run_id[:8], name="tiny", alias="good") == Registered("1", True)
    assert register_run(own.run_id, name="other", alias="best") == Registered("1", True)
    assert [find_version(own.client, f"models:/tiny@{alias}").run_id for alias in ("best", "good")] == [own.run_id] * 2


@pytest.mark.parametrize(
    ("ap", "digest", "only_if_better", "moved"),
    [("0.9", None, True, False), ("0.9", None, False, True), ("0.9", "other", True, True), ("0.0", None, True, True)],
)
def test_the_alias_stays_on_a_better_version_of_the_same_data(
    own: Trained, ap: str, digest: str | None, only_if_better: bool, moved: bool
) -> None:
    val_digest = digest or load_manifest(own.config.data.val).digest
    own.client.create_registered_model("tiny")
    own.client.create_model_version("tiny", source=str(own.folder), tags={"AP": ap, "val_digest": val_digest})
    own.client.set_registered_model_alias("tiny", "best", "1")
    best = catalog.best(own.folder)
    assert best is not None
    done = register(own.client, own.run_id, own.config, *best, name="tiny", alias="best", only_if_better=only_if_better)
    assert done == Registered("2", moved)
    assert str(find_version(own.client, "models:/tiny@best").version) == ("2" if moved else "1")


@pytest.mark.parametrize("error", [MlflowException("no room\nat all"), ConnectionError("no room")])
def test_a_refusal_of_the_registry_is_one_line_with_the_command_to_repeat(
    own: Trained, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_model_version", refuses)
        with pytest.raises(TrackingError, match=rf"no room\).*`detr register {own.run_id} --name tiny`") as caught:
            register_run(own.run_id, name="tiny", alias="best")
    assert "\n" not in str(caught.value)
    assert register_run(own.run_id, name="tiny", alias="best").version == "1"


def test_an_empty_registry_is_reported_as_empty(store: str, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="expected one of: none yet"):
        resolve("models:/tiny@best", tmp_path)


def test_a_version_whose_files_are_gone_is_one_line(own: Trained, tmp_path: Path) -> None:
    register_run("tiny", name="tiny", alias="best")
    shutil.rmtree(own.artifacts)
    with pytest.raises(RegistryError, match=r"models:/tiny@best") as caught:
        resolve("models:/tiny@best", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_version_that_others_registered_is_one_line(store: str, tmp_path: Path) -> None:
    client = connect()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "weights").write_text("theirs")
    client.create_registered_model("foreign")
    client.create_model_version("foreign", source=str(tmp_path / "foreign"))
    with pytest.raises(RegistryError, match=r"holds no card\.json; expected a model registered by `detr`"):
        resolve("models:/foreign/1", tmp_path)


def test_a_run_without_an_evaluated_checkpoint_cannot_be_registered(
    store: str, short_config: RunConfig, tmp_path: Path
) -> None:
    run_id = create_run(connect(), short_config, {}, {TAG_FOLDER: str(tmp_path / "empty")})
    with pytest.raises(RegistryError, match="has no evaluated checkpoint yet"):
        register_run(run_id, name="tiny", alias="best")


def test_a_name_or_alias_that_the_registry_refuses_is_one_line(own: Trained) -> None:
    for name, alias in (("team/tiny", "best"), ("", "best"), ("tiny", "latest"), ("tiny", "v 1")):
        with pytest.raises(RegistryError) as caught:
            register_run(own.run_id, name=name, alias=alias)
        assert "\n" not in str(caught.value)
        assert list(own.client.search_registered_models()) == []
