"""A registered version with a mask head, in a real MLflow store: evaluated, used, and chosen by its masks."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detr.model import DETR
from pipeline.checkpoint import catalog
from pipeline.config import RunConfig
from pipeline.inference.evaluate import evaluate
from pipeline.inference.predict import predict
from pipeline.registry.registration import register, register_run
from pipeline.registry.versions import find_version
from shards.config import WriteConfig
from shards.dataset.manifest import load_manifest
from shards.errors import ShardError
from shards.masks.rle import decode_masks
from shards.write.writer import write_coco
from tests.support.registry import Trained, train_in


@pytest.fixture(scope="module")
def masked(shared_store: str, masks_config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run of the mask head alone, which freezes the batch norm of the detector; registered as `masked`."""
    config = replace(
        masks_config,
        recipe="masked",
        model=replace(masks_config.model, norm="batch"),
        optim=replace(masks_config.optim, max_steps=1, train="mask_head"),
    )
    trained = train_in(tmp_path_factory.mktemp("masked"), config)
    register_run(trained.run_id, name="masked", alias="best")
    return trained


def test_a_registered_version_with_masks_evaluates_as_its_run_did(masked: Trained) -> None:
    best = catalog.best(masked.folder)
    assert best is not None
    found = evaluate("models:/masked@best", masked.config.data.val)
    assert found.score.metrics == pytest.approx(best[1], abs=1e-6)
    assert len(found.score.metrics) == 24
    assert find_version(masked.client, "models:/masked@best").tags["mask_AP"] == f"{best[1]['mask_AP']:.6f}"


def test_predictions_of_a_version_with_masks_have_the_mask_of_each_object(masked: Trained, tmp_path: Path) -> None:
    pictures = sorted(Path(masked.config.data.val).parent.glob("coco/val/*.jpg"))[:2]
    found = predict("models:/masked@best", pictures, tmp_path / "out", threshold=0.0)
    assert json.loads((tmp_path / "out" / "detections.json").read_text()) == found
    masks = decode_masks([result["segmentation"] for result in found], 64, 64)
    assert masks.shape == (16, 64, 64)
    assert masks.any()
    plain = np.asarray(Image.open(pictures[0]).resize((320, 320), Image.Resampling.NEAREST)).astype(int)
    drawn = np.asarray(Image.open(tmp_path / "out" / f"0001-{pictures[0].stem}.png")).astype(int)
    inside = np.any(masks[:8], axis=0).repeat(5, 0).repeat(5, 1)
    assert (plain != drawn).any(axis=2)[inside].mean() > 0.99


def test_data_without_segmentations_is_refused_before_the_model_runs(
    masked: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    val = Path(masked.config.data.val)
    coco = json.loads((val.parent / "coco" / "annotations" / "instances_val.json").read_text())
    coco["annotations"] = [annotation | {"segmentation": []} for annotation in coco["annotations"]]
    (tmp_path / "instances.json").write_text(json.dumps(coco))
    write_coco(val.parent / "coco" / "val", tmp_path / "instances.json", tmp_path / "out", WriteConfig())
    monkeypatch.setattr(DETR, "forward", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ShardError, match="has no segmentation"):
        evaluate("models:/masked@best", str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("current", "moved"),
    [({"AP": "0.9", "mask_AP": "0.0"}, True), ({"AP": "0.0", "mask_AP": "0.9"}, False), ({"AP": "0.9"}, False)],
    ids=["better boxes", "better masks", "without masks"],
)
def test_the_alias_stays_on_a_version_of_better_masks(
    masked: Trained, current: dict[str, str], moved: bool, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id.replace(" ", "-")
    val_digest = load_manifest(masked.config.data.val).digest
    masked.client.create_registered_model(name)
    masked.client.create_model_version(name, source=str(masked.folder), tags=current | {"val_digest": val_digest})
    masked.client.set_registered_model_alias(name, "best", "1")
    best = catalog.best(masked.folder)
    assert best is not None
    done = register(masked.client, masked.run_id, masked.config, *best, name=name, alias="best", only_if_better=True)
    assert done.alias_moved is moved
