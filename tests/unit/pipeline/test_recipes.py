from dataclasses import replace

import pytest

from pipeline.recipes import RECIPES

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


def test_the_mask_head_is_trained_on_the_paper_s_detector() -> None:
    masks, detector = RECIPES["detr-r50-masks"], RECIPES["detr-r50"]
    assert replace(masks.model, masks=False) == detector.model
    assert (masks.model.masks, masks.optim.train) == (True, "mask_head")
    assert (masks.optim.epochs, masks.optim.decay_epoch, masks.optim.lr) == (25, 15, 1e-4)


def test_a_recipe_is_found_under_its_own_name() -> None:
    assert all(config.recipe == name for name, config in RECIPES.items())
    assert {"demo", "overfit", "finetune", *PAPER} <= RECIPES.keys()
