"""A file of the original's, registered in a real MLflow store, is used like a version that was trained here."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from detr.config import ModelConfig
from detr.model import build_model
from detr.original import to_original_state_dict
from pipeline.config import RunConfig
from pipeline.driver.preflight import prepare
from pipeline.errors import RegistryError, TrackingError
from pipeline.exchange.export_original import export_original
from pipeline.exchange.import_original import import_file
from pipeline.inference.evaluate import evaluate
from pipeline.inference.predict import predict
from pipeline.registry.versions import find_version, read_version
from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.mlflow_runs import find_runs
from pipeline.train import resume
from shards.config import WriteConfig
from shards.dataset.manifest import load_manifest
from shards.write.writer import write_coco
from tests.support.real_data import COCO_TINY

needs_coco = pytest.mark.skipif(
    not COCO_TINY.is_dir(), reason=f"no COCO images at {COCO_TINY}; set DETR_COCO_TINY to a folder of them"
)
CONFIG = ModelConfig(
    backbone="resnet18", hidden_dim=32, encoder_layers=1, decoder_layers=2, feedforward_dim=32, num_queries=10
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published file of a small model of COCO's 91 labels, which takes everything for a cat: category 17."""
    path = tmp_path_factory.mktemp("original") / "detr-r18.pth"
    torch.manual_seed(0)
    model = build_model(CONFIG, 91)
    model.class_embed.bias.detach()[17] = 10.0
    torch.save({"model": to_original_state_dict(model)}, path)
    return path


@pytest.fixture(scope="module")
def imported(shared_store: str, file: Path) -> MlflowClient:
    done = import_file(file, name="small", alias="paper")
    assert done.registered[:2] == ("1", True)
    return connect()


def test_the_version_and_its_run_name_the_imported_file(imported: MlflowClient, file: Path) -> None:
    version = find_version(imported, "models:/small@paper")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert version.tags["imported_from"] == f"detr-r18.pth sha256:{digest}"
    assert not {"AP", "step", "train_digest"} & version.tags.keys()
    run = imported.get_run(version.run_id)
    assert (run.info.run_name, run.info.status) == ("import small", "FINISHED")
    assert run.data.tags["detr.imported_from"] == version.tags["imported_from"]
    assert "resnet18" in run.data.tags["detr.imported"]
    assert "assumed, for the file does not say: 8 heads" in run.data.tags["detr.imported"]
    assert find_runs(imported) == []  # those of `detr train`
    card = read_version("models:/small@paper")[1]
    assert (card.model, len(card.categories), card.transform.eval_size) == (CONFIG, 91, 800)
    assert card.imported_from == version.tags["imported_from"]


def test_the_weights_of_the_version_are_those_of_the_file(imported: MlflowClient, file: Path) -> None:
    model, _ = read_version("models:/small@paper")
    expected = torch.load(file, weights_only=True)["model"]
    state = to_original_state_dict(model)
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


@needs_coco
def test_an_imported_version_is_evaluated_by_category_id(imported: MlflowClient, file: Path, tmp_path: Path) -> None:
    annotations = json.loads((COCO_TINY / "annotations" / "instances_val2017.json").read_bytes())
    annotations["images"] = annotations["images"][:3]
    kept = {image["id"] for image in annotations["images"]}
    annotations["annotations"] = [entry for entry in annotations["annotations"] if entry["image_id"] in kept]
    (tmp_path / "val.json").write_text(json.dumps(annotations))
    write_coco(COCO_TINY / "val2017", tmp_path / "val.json", tmp_path / "val", WriteConfig())
    found = evaluate("models:/small@paper", str(tmp_path / "val"))
    manifest = load_manifest(str(tmp_path / "val"))
    assert 0 <= found.score.metrics["AP"] <= 1
    assert set(found.detections.image_ids.tolist()) == kept
    assert {(manifest.categories[label].id, manifest.categories[label].name) for label in found.detections.labels} == {
        (17, "cat")
    }


@needs_coco
def test_detections_of_an_imported_version_name_coco_categories(imported: MlflowClient, tmp_path: Path) -> None:
    pictures = sorted((COCO_TINY / "val2017").glob("*.jpg"))[:1]
    found = predict("models:/small@paper", pictures, tmp_path / "out", threshold=0.0)
    assert len(found) == 10
    assert {(result["category_id"], result["category"]) for result in found} == {(17, "cat")}


@pytest.mark.parametrize("uri", ["models:/small@paper", "models:/small/1"])
def test_an_imported_version_has_no_run_to_resume(imported: MlflowClient, uri: str) -> None:
    with pytest.raises(RegistryError, match=rf"{uri} was imported from detr-r18\.pth, so it has no run") as caught:
        resume(uri)
    assert f"`detr train finetune --initial {uri}`" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_from_an_imported_version_has_a_new_class_head(
    imported: MlflowClient, file: Path, short_config: RunConfig
) -> None:
    lines: list[str] = []
    config, ready = prepare(replace(short_config, initial="models:/small@paper"), lines.append)
    assert config.model == replace(CONFIG, dropout=short_config.model.dropout)
    assert any("its class head was of other classes and starts afresh for 4" in line for line in lines)
    before, after = torch.load(file, weights_only=True)["model"], to_original_state_dict(ready.model)
    replaced = {name for name in before if not torch.equal(before[name], after[name])}
    assert replaced == {"class_embed.weight", "class_embed.bias"}


def test_an_imported_version_is_exported_as_the_same_file(imported: MlflowClient, file: Path, tmp_path: Path) -> None:
    export_original("models:/small@paper", tmp_path / "out.pth")
    before, after = (torch.load(path, weights_only=True)["model"] for path in (file, tmp_path / "out.pth"))
    assert list(before) == list(after)
    assert all(np.array_equal(before[name].numpy(), after[name].numpy()) for name in before)


def test_each_import_is_a_version_of_its_own(store: str, file: Path) -> None:
    assert import_file(file, name="small", heads=4).registered.version == "1"
    assert import_file(file, name="small", heads=8).registered.version == "2"
    assert read_version("models:/small/1")[1].model.heads == 4
    assert str(find_version(connect(), "models:/small@best").version) == "2"


def test_a_refused_import_is_a_failed_run_and_names_the_command_to_repeat(
    store: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise ConnectionError("no room\nat all")

    monkeypatch.setattr(MlflowClient, "create_model_version", refuses)
    with pytest.raises(TrackingError, match=rf"no room\).*`detr import {file} --name small`") as caught:
        import_file(file, name="small")
    assert "\n" not in str(caught.value)
    client = connect()
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert run.info.status == "FAILED"
