import math
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest

from pipeline.recipes import NOTES, RECIPES
from shards.dataset.manifest import Manifest
from shards.plan.epoch import plan_epoch

PAPER = ["detr-r50", "detr-r50-dc5", "detr-r101", "detr-r101-dc5", "detr-r50-150ep"]


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_s_recipes_hold_the_paper_s_figures(name: str) -> None:
    config = RECIPES[name]
    optim, model, loss, transform = config.optim, config.model, config.loss, config.transform
    assert (optim.lr, optim.lr_backbone, optim.weight_decay, optim.clip_norm) == (1e-4, 1e-5, 1e-4, 0.1)
    assert (optim.batch_size, optim.decay, optim.decay_factor, optim.warmup_epochs) == (64, "step", 0.1, 0)
    assert (model.hidden_dim, model.heads, model.feedforward_dim, model.dropout) == (256, 8, 2048, 0.1)
    assert (model.encoder_layers, model.decoder_layers, model.num_queries) == (6, 6, 100)
    assert (model.norm, model.frozen_stages, model.backbone_weights) == ("frozen_batch", 2, "imagenet")
    departures = (model.pre_norm, model.position_at_input, model.tied_attention_init)
    assert departures == (False, False, False)
    assert (model.position, model.decoder_input, model.query_init) == ("sine", "zeros", "normal")
    assert (loss.cost_class, loss.cost_bbox, loss.cost_giou) == (1, 5, 2)
    assert (loss.weight_ce, loss.weight_bbox, loss.weight_giou, loss.eos_coef) == (1, 5, 2, 0.1)
    assert loss.auxiliary
    assert model.auxiliary
    assert transform.train_scales == tuple(range(480, 801, 32))
    assert (transform.eval_size, transform.max_size, transform.flip, transform.crop) == (800, 1333, 0.5, True)


def test_backbones_lengths_and_drops_are_those_of_the_names() -> None:
    shapes = {name: (RECIPES[name].model.backbone, RECIPES[name].model.dilation) for name in PAPER}
    assert shapes == {
        "detr-r50": ("resnet50", False),
        "detr-r50-dc5": ("resnet50", True),
        "detr-r101": ("resnet101", False),
        "detr-r101-dc5": ("resnet101", True),
        "detr-r50-150ep": ("resnet50", False),
    }
    lengths = {name: (RECIPES[name].optim.epochs, RECIPES[name].optim.decay_epoch) for name in PAPER}
    assert lengths == dict.fromkeys(PAPER, (300, 200)) | {"detr-r50-150ep": (150, 100)}


CLUSTERS = {"detr-r50-8gpu": 8, "detr-r50-16gpu": 16, "detr-r50-64gpu": 64, "detr-r50-64gpu-b256": 64}
PER_GPU = {"detr-r50-8gpu": 8, "detr-r50-16gpu": 4, "detr-r50-64gpu": 1, "detr-r50-64gpu-b256": 4}


@pytest.mark.parametrize("name", CLUSTERS)
def test_cluster_recipes_differ_from_the_paper_only_in_execution(name: str) -> None:
    config, paper = RECIPES[name], RECIPES["detr-r50"]
    assert config.cluster.workers == CLUSTERS[name]
    assert config.optim.batch_size / config.cluster.workers == PER_GPU[name]
    assert config.cluster.gpu == "yes"
    assert config.data.reader_threads <= config.cluster.cpus_per_worker
    assert config.checkpoint.every_steps > 0
    same = {
        "recipe": "detr-r50", "cluster": paper.cluster, "checkpoint": paper.checkpoint, "track": paper.track
    }  # fmt: skip
    if name != "detr-r50-64gpu-b256":
        assert replace(config, **same) == paper  # type: ignore[arg-type]


def test_a_larger_batch_scales_rates_by_the_root_and_warms_up() -> None:
    large, paper = RECIPES["detr-r50-64gpu-b256"].optim, RECIPES["detr-r50"].optim
    factor = math.sqrt(large.batch_size / paper.batch_size)
    assert (large.lr, large.lr_backbone) == (factor * paper.lr, factor * paper.lr_backbone)
    assert large.warmup_epochs > 0
    unscaled = replace(
        large, batch_size=64, lr=paper.lr, lr_backbone=paper.lr_backbone, warmup_epochs=paper.warmup_epochs
    )
    assert unscaled == paper


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_note_says_how_rate_and_batch_are_treated(name: str) -> None:
    optim, note = RECIPES[name].optim, NOTES[name]
    assert f"{optim.batch_size} = {CLUSTERS[name]} x {PER_GPU[name]}" in note
    for rate in (optim.lr, optim.lr_backbone):
        assert f"{rate:.0e}".replace("e-0", "e-") in note
    assert ("UNTRIED" in note) == (optim.batch_size != 64)


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_rank_of_a_cluster_has_its_images_in_every_step(name: str) -> None:
    config = RECIPES[name]
    manifest = cast(Manifest, SimpleNamespace(images=1000))
    plan = plan_epoch(manifest, seed=0, epoch=0, batch_size=config.optim.batch_size)
    for rank in range(config.cluster.workers):
        assert len(plan.step(1, rank, config.cluster.workers)[0]) == PER_GPU[name]


def test_the_mask_head_is_trained_on_the_paper_s_detector() -> None:
    masks, detector = RECIPES["detr-r50-masks"], RECIPES["detr-r50"]
    assert replace(masks.model, masks=False) == detector.model
    assert (masks.model.masks, masks.optim.train) == (True, "mask_head")
    assert (masks.optim.epochs, masks.optim.decay_epoch, masks.optim.lr) == (25, 15, 1e-4)


def test_a_recipe_is_found_under_its_own_name() -> None:
    assert all(config.recipe == name for name, config in RECIPES.items())
    assert {"demo", "overfit", "finetune", *PAPER} <= RECIPES.keys()


PANOPTIC = {
    "detr-r50": ("resnet50", False, "PQ 43.4"),
    "detr-r50-dc5": ("resnet50", True, "PQ 44.6"),
    "detr-r101": ("resnet101", False, "PQ 45.1"),
    "detr-r101-dc5": ("resnet101", True, "no figure"),
}


@pytest.mark.parametrize("name", PANOPTIC)
def test_panoptic_recipes_train_boxes_as_the_detector_and_then_the_mask_head_alone(name: str) -> None:
    detector, boxes, masks = RECIPES[name], RECIPES[f"{name}-panoptic-boxes"], RECIPES[f"{name}-panoptic"]
    backbone, dilation, figure = PANOPTIC[name]
    assert (boxes.model.backbone, boxes.model.dilation) == (backbone, dilation)
    assert boxes.optim == replace(detector.optim, batch_size=16)  # 8 GPUs with 2 images each
    assert boxes.model == detector.model
    assert masks.model == replace(detector.model, masks=True)
    assert masks.optim == replace(boxes.optim, epochs=25, decay_epoch=15, train="mask_head")
    assert (masks.optim.lr, masks.optim.decay_factor) == (1e-4, 0.1)
    assert figure in NOTES[f"{name}-panoptic"]
