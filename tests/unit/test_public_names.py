"""The names that other people's code relies on."""

import importlib
import inspect
from dataclasses import fields, is_dataclass
from typing import Any

import pytest

SIGNATURES = {
    "detr.model.build_model": ("config", "num_classes"),
    "detr.model.DETR.forward": ("self", "images", "padding"),
    "detr.matcher.match": ("outputs", "targets", "config"),
    "detr.criterion.compute_losses": ("outputs", "targets", "num_boxes", "config"),
    "detr.postprocess.detect": ("outputs", "original_sizes"),
    "detr.panoptic.panoptic": ("outputs", "original_sizes", "sizes", "canvas", "stuff", "threshold"),
    "detr.original.load_original_state_dict": ("model", "state_dict"),
    "detr.original.to_original_state_dict": ("model",),
    "shards.write_coco": ("images", "annotations", "out", "config"),
    "shards.load_manifest": ("url",),
    "shards.verify": ("url",),
    "shards.plan_epoch": ("manifest", "seed", "epoch", "batch_size"),
    "shards.open_loader": ("manifest", "plan", "rank", "world_size", "start_step", "transform", "collate", "config"),
    "shards.open_webdataset": ("url",),
    "shards.coco_metrics": ("manifest", "detections"),
    "shards.score.panoptic_folders.score_folders": ("truth", "true_pngs", "prediction", "predicted_pngs"),
    "pipeline.train.train": ("config",),
    "pipeline.resume": ("name",),
    "pipeline.evaluate": ("uri",),
    "pipeline.predict": ("uri", "images", "out"),
    "pipeline.register": (),
    "pipeline.resolve": (),
    "jobs.submit.submit": ("spec", "argv"),
}
FIELDS = {
    "detr.model.Outputs": ("logits", "boxes", "auxiliary", "masks"),
    "detr.batch.Batch": ("images", "padding", "targets"),
    "detr.batch.Target": ("boxes", "labels", "image_id", "original_size", "masks"),
    "detr.criterion.Losses": ("total", "parts"),
    "detr.postprocess.Detection": ("scores", "labels", "boxes_xyxy"),
    "detr.config.ModelConfig": ("backbone", "dilation", "position", "hidden_dim", "heads", "num_queries", "masks"),
    "detr.config.LossConfig": (
        "cost_class",
        "cost_bbox",
        "cost_giou",
        "weight_bbox",
        "weight_giou",
        "eos_coef",
        "auxiliary",
    ),
    "pipeline.RunConfig": ("model", "loss", "data", "optim", "compute", "cluster", "checkpoint", "evaluate", "track"),
}


def find(name: str) -> Any:
    """Return the object behind a dotted name."""
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"no module of {name}")


@pytest.mark.parametrize("name", SIGNATURES)
def test_function_takes_its_arguments(name: str) -> None:
    parameters = list(inspect.signature(find(name)).parameters)
    assert [wanted for wanted in SIGNATURES[name] if wanted not in parameters] == [], parameters


@pytest.mark.parametrize("name", FIELDS)
def test_class_has_its_fields(name: str) -> None:
    found = find(name)
    names = [field.name for field in fields(found)] if is_dataclass(found) else list(found._fields)
    assert [wanted for wanted in FIELDS[name] if wanted not in names] == [], names


def test_recipes_are_configurations() -> None:
    recipes, config = find("pipeline.RECIPES"), find("pipeline.RunConfig")
    assert {"detr-r50", "demo", "finetune"} <= set(recipes)
    assert all(isinstance(recipe, config) for recipe in recipes.values())
