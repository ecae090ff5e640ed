"""A registered version, in a real MLflow store, is enough: to find, to evaluate, to serve."""

import base64
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from detr.model import build_model
from jobs.commands.models import evaluate as evaluate_command
from pipeline.checkpoint import catalog
from pipeline.checkpoint import state as checkpoint_state
from pipeline.config import RunConfig
from pipeline.errors import PipelineError, RegistryError
from pipeline.evaluation.evaluate_model import EvaluateOptions, evaluate_model
from pipeline.inference.evaluate import evaluate
from pipeline.inference.predict import predict
from pipeline.registry.card import read_card
from pipeline.registry.registration import register_run
from pipeline.registry.versions import find_version, read_version, resolve, run_of
from pipeline.tracking.mlflow_client import connect
from shards.dataset.manifest import load_manifest
from shards.rgb import Exif
from tests.support.pictures import kinds, png_of
from tests.support.registry import Trained, train_in


@pytest.fixture(scope="module")
def trained(shared_store: str, short_config: RunConfig) -> Trained:
    """For tests that leave run and registry as they are."""
    return train_in(Path(shared_store.removeprefix("sqlite:///")).parent, short_config)


@pytest.fixture(scope="module")
def version(trained: Trained) -> str:
    return register_run(trained.run_id, name="tiny", alias="best").version


@pytest.fixture
def _fresh_modules() -> Iterator[None]:
    """MLflow puts a model's own code first on the path; the tests that follow want this project's."""
    import sys

    before, path = dict(sys.modules), list(sys.path)
    yield
    sys.path[:] = path
    for name in list(sys.modules):
        if name.split(".")[0] in ("detr", "shards", "pipeline"):
            del sys.modules[name]
    sys.modules.update({name: module for name, module in before.items() if name not in sys.modules})


def test_a_version_names_its_origin(trained: Trained, version: str) -> None:
    found = find_version(trained.client, "models:/tiny@best")
    best = catalog.best(trained.folder)
    assert best is not None
    assert str(found.version) == version == "1"
    assert found.run_id == trained.run_id == run_of(trained.client, "models:/tiny/1")
    assert found.tags["checkpoint_uri"] == str(best[0])
    assert found.tags["code_commit"] == "abc123"
    assert found.tags["train_digest"] == load_manifest(trained.config.data.train).digest
    assert found.tags["val_digest"] == load_manifest(trained.config.data.val).digest
    assert found.tags["AP"] == f"{best[1]['AP']:.6f}"
    card = read_version("models:/tiny@best")[1]
    assert (card.run_id, card.step, card.recipe, card.metrics) == (trained.run_id, 1, "tiny", best[1])
    assert [category.id for category in card.categories] == [1, 2, 3, 4]


def test_every_layer_is_scored_and_the_last_as_without_per_layer(
    trained: Trained, version: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["models:/tiny@best", "--data", trained.config.data.val, "--json"]
    evaluate_command([*arguments, str(tmp_path / "plain.json"), "--curves", str(tmp_path / "curves")])
    with Image.open(tmp_path / "curves") as picture:
        assert (picture.format, picture.size) == ("PNG", (640, 480))
    plain = capsys.readouterr().out
    evaluate_command([*arguments, str(tmp_path / "layers.json"), "--per-layer", "--nms-iou", "0.5"])
    layers = capsys.readouterr().out
    assert layers.startswith(plain.rstrip("\n"))
    assert "decoder layer  AP     AP50   AP, NMS 0.5  AP50, NMS 0.5" in layers
    figures = json.loads((tmp_path / "layers.json").read_text())
    rows = figures.pop("layers")
    assert figures == json.loads((tmp_path / "plain.json").read_text()) == rows[2]["metrics"]
    kinds = [(1, None), (1, 0.5), (2, None), (2, 0.5), (None, 0.5)]
    assert [(row["layer"], row["nms"]) for row in rows] == kinds
    assert all(len(row["metrics"]) == 12 for row in rows)


def test_a_report_is_a_page_with_proposals_and_an_artifact_of_the_run(
    trained: Trained, version: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new" / "report"
    evaluate_command(["models:/tiny@best", "--data", trained.config.data.val, "--report", str(folder)])
    page = (folder / "report.html").read_text()
    assert f"models:/tiny/1 on {load_manifest(trained.config.data.val).name}" in page
    assert "<h2>Attention</h2>" in page
    assert "corrections" in json.loads((folder / "corrections.json").read_text())
    path = capsys.readouterr().out.split("in MLflow: ")[1].strip()
    kept = trained.client.download_artifacts(trained.run_id, path, str(tmp_path))
    assert Path(kept).read_text() == page


def test_a_registered_version_evaluates_as_the_model_in_memory(trained: Trained, version: str) -> None:
    best = catalog.best(trained.folder)
    assert best is not None
    model = build_model(trained.config.model, 4)
    checkpoint_state.load_weights(best[0], model)
    val = load_manifest(trained.config.data.val)
    expected = evaluate_model(model, val, val.categories, EvaluateOptions(trained.config.transform, batch_size=2))
    found = evaluate("models:/tiny@best", trained.config.data.val)
    assert expected is not None
    assert found.score.metrics == pytest.approx(expected.score.metrics, abs=1e-6)
    assert found.score.metrics == pytest.approx(best[1], abs=1e-6)
    np.testing.assert_allclose(found.detections.scores, expected.detections.scores, atol=1e-6)
    np.testing.assert_allclose(found.detections.boxes_xywh, expected.detections.boxes_xywh, atol=1e-4)


def test_a_card_without_batching_is_evaluated_in_padded_batches(trained: Trained, version: str, tmp_path: Path) -> None:
    folder = resolve("models:/tiny@best", tmp_path)
    assert read_card(folder).evaluate_batching == "same_size"
    card = json.loads((folder / "card.json").read_text())
    del card["evaluate_batching"], card["ema"]
    (tmp_path / "card.json").write_text(json.dumps(card))
    assert read_card(tmp_path).evaluate_batching == "padded"


@pytest.mark.parametrize("batching", ["same_size", "padded"])
def test_a_version_is_evaluated_in_the_batches_that_its_card_names(
    trained: Trained, version: str, monkeypatch: pytest.MonkeyPatch, batching: str
) -> None:
    seen = []

    def stop(model: Any, manifest: Any, categories: Any, options: EvaluateOptions, **_: Any) -> Any:
        seen.append(options.batching)
        raise InterruptedError

    monkeypatch.setattr("pipeline.inference.evaluate.evaluate_model", stop)
    model, card = read_version("models:/tiny@best")
    card = msgspec.structs.replace(card, evaluate_batching=batching)
    monkeypatch.setattr("pipeline.inference.evaluate.read_version", lambda uri: (model, card))
    with pytest.raises(InterruptedError):
        evaluate("models:/tiny@best", trained.config.data.val)
    assert seen == [batching]


def test_a_version_does_not_need_the_files_of_its_run(own: Trained) -> None:
    register_run("tiny", name="tiny", alias="best")
    shutil.rmtree(own.folder)
    assert evaluate("models:/tiny@best", own.config.data.val).score.metrics["AP"] >= 0


def test_no_stored_file_is_a_pickle(trained: Trained, version: str) -> None:
    stored = [path for path in trained.artifacts.rglob("*") if path.is_file()]
    assert {"model.safetensors", "card.json", "MLmodel"} <= {path.name for path in stored}
    assert not [path for path in stored if path.suffix in (".pkl", ".pickle", ".pth", ".pt", ".bin", ".ckpt")]
    assert not [path for path in stored if "__pycache__" in path.parts]


@pytest.mark.usefixtures("_fresh_modules")
def test_mlflow_serves_the_version_from_base64_pictures(trained: Trained, version: str, tiny_data: object) -> None:
    import mlflow
    import pandas

    connect()
    served = mlflow.pyfunc.load_model("models:/tiny@best")
    picture = next(Path(trained.config.data.val).parent.glob("coco/val/*.jpg"))
    text = base64.b64encode(picture.read_bytes()).decode()
    grey = io.BytesIO()
    Image.new("L", (50, 80), 9).save(grey, "PNG")
    both = pandas.DataFrame({"image": [text, base64.b64encode(grey.getvalue()).decode()]})
    answers = served.predict(both, params={"threshold": 0.0})
    assert [len(answer["detections"]) for answer in answers] == [8, 8]
    assert [(answer["width"], answer["height"]) for answer in answers] == [(64, 64), (50, 80)]
    first = answers[0]["detections"][0]
    assert first["category_id"] in (1, 2, 3, 4)
    assert set(first) == {"category_id", "category", "bbox", "score"}
    scores = [result["score"] for result in answers[0]["detections"]]
    assert scores == sorted(scores, reverse=True)
    assert [answer["detections"] for answer in served.predict(both, params={"threshold": 1.0})] == [[], []]


def test_predictions_are_written_with_pictures_and_original_category_ids(
    trained: Trained, version: str, tmp_path: Path
) -> None:
    pictures = sorted(Path(trained.config.data.val).parent.glob("coco/val/*.jpg"))[:2]
    found = predict("models:/tiny@best", pictures, tmp_path / "out", threshold=0.0)
    assert predict("models:/tiny@best", pictures, tmp_path / "attention", threshold=0.0, attention=True) == found
    assert len(list((tmp_path / "attention").glob("*-attention.png"))) == 2
    assert json.loads((tmp_path / "out" / "detections.json").read_text()) == found
    assert len(found) == 16
    assert {result["file_name"] for result in found} == {str(path) for path in pictures}
    assert [result["image_id"] for result in found] == [1] * 8 + [2] * 8
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    for result in found:
        x, y, width, height = result["bbox"]
        assert -1e-3 <= x <= x + width <= 64.001
        assert -1e-3 <= y <= y + height <= 64.001


def test_a_file_that_is_no_picture_is_one_line_before_anything_is_written(version: str, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "large.png").write_bytes(png_of(20_000, 20_000))
    for path, message in (
        ("text.jpg", "not a picture that can be read"),
        ("none.jpg", "no such file"),
        ("large.png", "more than 89 megapixels"),
    ):
        with pytest.raises(PipelineError, match=message) as caught:
            predict("models:/tiny@best", [tmp_path / path], tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("exif", "size"), [("upright", (64, 96)), ("ignore", (96, 64))])
def test_a_picture_of_a_turned_camera_is_drawn_upright_unless_exif_is_ignored(
    version: str, tmp_path: Path, exif: Exif, size: tuple[int, int]
) -> None:
    (row,) = next(kind.rows for kind in kinds() if kind.name == "EXIF")
    (tmp_path / "turned.jpg").write_bytes(base64.b64decode(str(row)))
    found = predict("models:/tiny@best", [tmp_path / "turned.jpg"], tmp_path / "out", threshold=0.0, exif=exif)
    with Image.open(tmp_path / "out" / "0001-turned.png") as drawn:
        assert drawn.size[0] * size[1] == drawn.size[1] * size[0]  # drawn larger
    assert max(x + width for x, _, width, _ in (result["bbox"] for result in found)) <= size[0] + 1e-3
    assert max(y + height for _, y, _, height in (result["bbox"] for result in found)) <= size[1] + 1e-3


@pytest.mark.parametrize("threshold", [-0.1, 1.1])
def test_predicting_with_a_threshold_that_is_no_score_is_refused(tmp_path: Path, threshold: float) -> None:
    with pytest.raises(PipelineError, match="expected a score from 0 to 1"):
        predict("models:/tiny@best", [], tmp_path / "out", threshold=threshold)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("models:/big@best", r"there is no registered model 'big'; expected one of: tiny"),
        ("models:/big/1", r"there is no registered model 'big'; expected one of: tiny"),
        ("models:/tiny@good", r"registered model 'tiny' has no @good; it has @best"),
        ("models:/tiny/7", r"registered model 'tiny' has no /7; it has @best"),
        ("models:/tiny", r"names no version; expected models:/NAME@ALIAS"),
        ("models:/tiny/newest", r"names no version; expected models:/NAME@ALIAS"),
        ("models:/", r"names no version; expected models:/NAME@ALIAS"),
        ("models:/@best", r"expected"),
        ("models:/tiny@", r"expected|has no"),
        ("runs/tiny", r"is no registered model; expected models:/NAME@ALIAS"),
    ],
)
def test_an_unknown_version_is_one_line_that_names_the_known_ones(
    version: str, uri: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(RegistryError, match=message) as caught:
        resolve(uri, tmp_path)
    assert "\n" not in str(caught.value)


def test_evaluating_on_data_of_other_categories_is_refused(trained: Trained, version: str, tmp_path: Path) -> None:
    manifest = tmp_path / "other"
    shutil.copytree(trained.config.data.val, manifest)
    content = json.loads((manifest / "manifest.json").read_text())
    content["categories"][1]["name"] = "bus"
    (manifest / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(PipelineError, match="category 2 is 'square' to the model and 'bus'"):
        evaluate("models:/tiny@best", str(manifest))


def test_a_run_starts_from_a_registered_version(trained: Trained, version: str) -> None:
    from pipeline.driver.preflight import prepare

    lines: list[str] = []
    other = replace(
        trained.config, initial="models:/tiny@best", model=replace(trained.config.model, hidden_dim=32, num_queries=3)
    )
    config, ready = prepare(other, lines.append)
    assert config.model == trained.config.model
    assert config.initial == "models:/tiny/1"  # the alias may move while the run trains
    assert "starting from models:/tiny/1" in lines
    model = build_model(trained.config.model, 4)
    best = catalog.best(trained.folder)
    assert best is not None
    checkpoint_state.load_weights(best[0], model)
    assert torch.equal(ready.model.class_embed.weight, model.class_embed.weight)
