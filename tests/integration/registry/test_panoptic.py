"""Panoptic segmentation from files to files: shards, boxes, masks, a registered version, and its PNGs scored by COCO's rules."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.checkpoint import catalog
from pipeline.comparison.compare import compare
from pipeline.config import RunConfig
from pipeline.distributed.ranks import Ranks
from pipeline.driver.preflight import prepare
from pipeline.inference.evaluate import evaluate
from pipeline.inference.predict import predict
from pipeline.registry.registration import register_run
from pipeline.registry.versions import find_version
from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.mlflow_runs import create_run
from pipeline.tracking.tags import TAG_FOLDER
from pipeline.training.loop import run
from pipeline.training.state import RunInfo
from shards.config import WriteConfig
from shards.dataset.manifest import load_manifest
from shards.masks.rle import decode_masks
from shards.panoptic.built_in import PanopticSplit, write_synthetic_panoptic
from shards.panoptic.segment_png import read_ids
from shards.score.panoptic_folders import score_folders
from shards.write.writer import write_panoptic
from tests.support.ranks import run_ranks
from tests.support.serving import serving


@dataclass(frozen=True)
class Segmented:
    """A version that has learned a few images, registered as `panoptic`, and these images."""

    config: RunConfig
    folder: Path
    truth: PanopticSplit


def train(ranks: Ranks, config: RunConfig, run_info: RunInfo) -> None:
    run(config, run_info, ranks, None)


def trained(config: RunConfig, folder: Path, name: str) -> RunConfig:
    """Train a run with two workers and register it."""
    config, prepared = prepare(config, lambda _: None)
    prepared.write_initial_weights(folder)
    run_id = create_run(connect(), config, prepared.datasets, {TAG_FOLDER: str(folder)})
    run_ranks(2, train, config, RunInfo(run_id, folder, "commit"))
    register_run(run_id, name=name, alias="best")
    return config


@pytest.fixture(scope="module")
def learned(shared_store: str, masks_config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Segmented:
    root = tmp_path_factory.mktemp("panoptic")
    truth = write_synthetic_panoptic(root / "source", train=6, val=1, size=64).train
    data = str(root / "data")
    write_panoptic(*vars(truth).values(), data, WriteConfig())
    boxes = replace(
        masks_config,
        recipe="boxes",
        storage=str(root / "runs"),
        model=replace(masks_config.model, masks=False, dropout=0.0),
        transform=replace(masks_config.transform, train_scales=(64,), flip=0.0),
        data=replace(masks_config.data, train=data, val=data),
        optim=replace(masks_config.optim, batch_size=6, epochs=100, lr=1e-3, lr_backbone=1e-3, decay_epoch=80),
        evaluate=replace(masks_config.evaluate, every=100, batch_size=1, explain=False),  # as `detr predict` does
    )
    trained(boxes, root / "runs" / "boxes", "boxes")
    masks = replace(
        boxes,
        recipe="panoptic",
        initial="models:/boxes@best",
        model=replace(boxes.model, masks=True),
        optim=replace(boxes.optim, epochs=60, decay_epoch=50, lr=2e-3, train="mask_head"),
        evaluate=replace(boxes.evaluate, every=60),
    )
    return Segmented(trained(masks, root / "runs" / "panoptic", "panoptic"), root / "runs" / "panoptic", truth)


def test_a_registered_version_has_the_quality_that_its_run_measured(learned: Segmented) -> None:
    best = catalog.best(learned.folder)
    assert best is not None
    found = evaluate("models:/panoptic@best", learned.config.data.val)
    assert found.score.metrics == pytest.approx(best[1], abs=1e-6)
    assert found.score.metrics["PQ"] > 0.05
    client = connect()
    assert find_version(client, "models:/panoptic@best").tags["PQ"] == f"{best[1]['PQ']:.6f}"


def test_versions_are_compared_by_the_segments_that_their_evaluations_kept(learned: Segmented) -> None:
    best = catalog.best(learned.folder)
    assert best is not None
    found = compare("models:/panoptic@best", "models:/panoptic@best")
    assert (found.decided_by, found.difference.deciding.before) == ("PQ", best[1]["PQ"])
    boxes = compare("models:/boxes@best", "models:/panoptic@best")
    assert boxes.decided_by.startswith("AP of boxes of things, since no segments of models:/boxes/1 are kept")


def test_predicted_pngs_score_the_same_by_coco_s_rules(learned: Segmented, tmp_path: Path) -> None:
    pictures = sorted(learned.truth.images.glob("*.jpg"))  # numbered from 1, as the data set is
    predict("models:/panoptic@best", pictures, tmp_path)
    expected = evaluate("models:/panoptic@best", learned.config.data.val).panoptic
    assert expected is not None
    found = score_folders(
        learned.truth.annotations, learned.truth.segments, tmp_path / "panoptic.json", tmp_path / "panoptic"
    )
    assert found.all is not None
    assert expected.quality.all is not None
    assert found.all.pq == pytest.approx(expected.quality.all.pq, abs=1e-6)
    document = json.loads((tmp_path / "panoptic.json").read_text())
    manifest = load_manifest(learned.config.data.val)
    assert [entry["id"] for entry in document["categories"]] == [category.id for category in manifest.categories]
    for entry in document["annotations"]:
        ids = read_ids((tmp_path / "panoptic" / entry["file_name"]).read_bytes())
        assert set(np.unique(ids).tolist()) - {0} == {info["id"] for info in entry["segments_info"]}
        for info in entry["segments_info"]:
            rows, columns = np.nonzero(ids == info["id"])
            assert info["area"] == len(rows)
            assert info["bbox"][:2] == [columns.min(), rows.min()]
    with Image.open(tmp_path / f"0001-{pictures[0].stem}.png") as drawn:
        assert drawn.size == (320, 320)


def test_a_served_version_answers_with_the_segments_that_are_predicted(learned: Segmented, tmp_path: Path) -> None:
    pictures = sorted(learned.truth.images.glob("*.jpg"))
    predict("models:/panoptic@best", pictures, tmp_path)
    with serving("models:/panoptic@best", tmp_path) as server:
        status, answer = server.ask([base64.b64encode(picture.read_bytes()).decode() for picture in pictures])
    assert status == 200, answer
    entries = json.loads((tmp_path / "panoptic.json").read_text())["annotations"]
    assert sum(len(entry["segments_info"]) for entry in entries) > len(pictures)
    for found, entry in zip(answer["predictions"], entries, strict=True):
        assert set(found) == {"width", "height", "detections", "segments", "panoptic_png"}
        png = (tmp_path / "panoptic" / entry["file_name"]).read_bytes()
        assert base64.b64decode(found["panoptic_png"]) == png
        masks = decode_masks([segment.pop("segmentation") for segment in found["segments"]], 64, 64)
        names = [segment.pop("category") for segment in found["segments"]]
        assert found["segments"] == entry["segments_info"]
        assert set(names) <= {category.name for category in load_manifest(learned.config.data.val).categories}
        for segment, mask in zip(found["segments"], masks, strict=True):
            assert np.array_equal(mask, read_ids(png) == segment["id"])
