"""Versions in an MLflow store whose detections are kept, and which have no files: enough to compare and promote."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from mlflow import MlflowClient

from pipeline.evaluation.evaluate_model import Evaluation
from pipeline.evaluation.kept import keep
from pipeline.registry.kept_detections import store
from pipeline.tracking.mlflow_runs import experiment_id
from pipeline.tracking.tags import TAG_FOLDER
from shards.dataset.manifest import Manifest
from shards.score.coco_eval import score_detections
from shards.score.detections import Detections
from tests.support.labelled import labelled, learned_by_heart

_GRID = [(x, y, 70.0, 50.0) for y in (20.0, 170.0) for x in (20.0, 220.0)]


def grid_data(images: int = 120) -> Manifest:
    """Return a data set of four objects in each image, of three classes."""
    return labelled([[((image + number) % 3, *box) for number, box in enumerate(_GRID)] for image in range(images)])


def missing(found: Detections, share: float, seed: int = 5) -> Detections:
    """Return the detections without a share of them."""
    return found.take(np.random.default_rng(seed).random(len(found)) >= share)


def shaken(found: Detections, seed: int, by: float = 0.04) -> Detections:
    """Return the detections with noise in their boxes, which costs AP; two seeds cost the same but for chance."""
    return replace(
        found, boxes_xywh=found.boxes_xywh * (1 + np.random.default_rng(seed).normal(0, by, found.boxes_xywh.shape))
    )


@dataclass(frozen=True)
class Registry:
    """A store, and the data set that versions in it are scored on."""

    client: MlflowClient
    data: Manifest

    @property
    def experiment(self) -> str:
        """Experiment of the versions' runs, with its artifacts beside the store."""
        return experiment_id(self.client, "scored")

    def version(self, name: str, detections: Detections | None, data: Manifest | None = None) -> str:
        """Register a version of a run of its own, whose detections are kept unless there are none; return its address."""
        data = data or self.data
        number = sum(1 for _ in self.client.search_model_versions(f"name = '{name}'")) + 1
        run = self.client.create_run(self.experiment, run_name=f"{name}-{number}", tags={TAG_FOLDER: "/nowhere"})
        if number == 1:
            self.client.create_registered_model(name)
        tags = {"step": "7", "val_digest": data.digest}
        self.client.create_model_version(name, source="nowhere", run_id=run.info.run_id, tags=tags)
        uri = f"models:/{name}/{number}"
        if detections is not None:
            self.keep(uri, detections, data)
        return uri

    def keep(self, uri: str, detections: Detections, data: Manifest) -> None:
        """Keep the detections of a version on a data set."""
        self.keep_evaluation(
            uri, Evaluation(score_detections(data, detections), detections, np.arange(data.images)), data
        )

    def keep_evaluation(self, uri: str, evaluation: Evaluation, data: Manifest) -> None:
        """Keep what is kept of an evaluation of a version."""
        name, _, number = uri.removeprefix("models:/").rpartition("/")
        run_id = self.client.get_model_version(name, number).run_id
        store(self.client, run_id, 7, keep(data, evaluation))

    def tags(self, uri: str, alias: str = "production") -> dict[str, str]:
        """Return what a version says of its promotion."""
        name, _, number = uri.removeprefix("models:/").rpartition("/")
        prefix = f"promoted.{alias}."
        tags = self.client.get_model_version(name, number).tags
        return {key.removeprefix(prefix): value for key, value in tags.items() if key.startswith(prefix)}

    def holder(self, name: str, alias: str = "production") -> str | None:
        """Return the version that has an alias."""
        number = self.client.get_registered_model(name).aliases.get(alias)
        return None if number is None else str(number)


def perfect(data: Manifest) -> Detections:
    """Return the detections of a model that knows the data set."""
    return learned_by_heart(data)
