"""Runs that start from a whole model: its classes, its shape, and its mask head."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from detr.original import to_original_state_dict
from pipeline.config import RunConfig
from pipeline.driver.initial_weights import adopt_model_config, initial_model
from pipeline.errors import RunConfigError
from pipeline.recipes import RECIPES
from pipeline.training.model import build_trainable_model
from shards.dataset.categories import Category
from tests.support.first_weights import CLASSES, assert_same, registered, seeded


def test_a_run_starts_from_a_state_dict_of_the_same_classes(tiny_config: RunConfig, tmp_path: Path) -> None:
    before = seeded(tiny_config, 4)
    torch.save({"model": to_original_state_dict(before)}, tmp_path / "original.pth")
    model, notes = initial_model(replace(tiny_config, initial=str(tmp_path / "original.pth")), CLASSES, None)
    assert_same(to_original_state_dict(model), to_original_state_dict(before))
    assert notes == (f"starting from {tmp_path / 'original.pth'}",)


@pytest.mark.parametrize(
    "classes",
    [CLASSES[:3], (*CLASSES[:3], Category(4, "z")), (*CLASSES[:3], Category(5, "d"))],
    ids=["fewer", "another name", "another id"],
)
def test_a_model_of_other_classes_gives_all_but_its_class_head(
    tiny_config: RunConfig, tmp_path: Path, classes: tuple[Category, ...]
) -> None:
    before = to_original_state_dict(registered(tmp_path, tiny_config, CLASSES))
    config = replace(tiny_config, initial="models:/tiny@best")
    model, notes = initial_model(config, classes, tmp_path)
    after = to_original_state_dict(model)
    replaced = {
        name for name in before if after[name].shape != before[name].shape or (after[name] != before[name]).any()
    }
    assert replaced == {"class_embed.weight", "class_embed.bias"}
    assert after["class_embed.weight"].shape[0] == len(classes) + 1
    assert "its class head was of other classes and starts afresh" in notes[0]
    assert f"for {len(classes)}" in notes[0]


def test_a_registered_model_of_the_same_classes_gives_everything(tiny_config: RunConfig, tmp_path: Path) -> None:
    before = registered(tmp_path, tiny_config, CLASSES)
    model, notes = initial_model(replace(tiny_config, initial="models:/tiny@best"), CLASSES, tmp_path)
    assert_same(to_original_state_dict(model), to_original_state_dict(before))
    assert notes == ("starting from models:/tiny@best",)


@pytest.mark.parametrize("unnamed", [0, 1], ids=["contiguous", "with a label of no category"])
def test_colours_and_kinds_are_no_difference_of_classes(tiny_config: RunConfig, tmp_path: Path, unnamed: int) -> None:
    registered(tmp_path, tiny_config, (*[Category(0, "N/A")] * unnamed, *CLASSES))
    coloured = tuple(Category(known.id, known.name, known.id < 3, (known.id, 0, 0)) for known in CLASSES)
    _, notes = initial_model(replace(tiny_config, initial="models:/tiny@best"), coloured, tmp_path)
    assert notes == ("starting from models:/tiny@best",)


def test_labels_without_a_category_leave_the_class_head(tiny_config: RunConfig, tmp_path: Path) -> None:
    """An imported model's labels are category ids: the data's classes have the rows of theirs, and "no object" its own."""
    labels = (Category(0, "N/A"), *CLASSES[:2], Category(3, "N/A"), Category(4, "d"))
    before = to_original_state_dict(registered(tmp_path, tiny_config, labels))
    classes = (*CLASSES[:2], Category(4, "d"))
    model, notes = initial_model(replace(tiny_config, initial="models:/tiny@best"), classes, tmp_path)
    after = to_original_state_dict(model)
    for name in ("class_embed.weight", "class_embed.bias"):
        assert torch.equal(after.pop(name), before.pop(name)[[1, 2, 4, 5]])
    assert_same(after, before)
    assert notes == ("starting from models:/tiny@best",)
    _, notes = initial_model(replace(tiny_config, initial="models:/tiny@best"), CLASSES, tmp_path)
    assert "its class head was of other classes and starts afresh for 4" in notes[0]


def test_a_run_takes_the_initial_model_s_shape_but_not_its_dropout(tiny_config: RunConfig, tmp_path: Path) -> None:
    registered(tmp_path, tiny_config, CLASSES)
    other = replace(tiny_config, model=replace(tiny_config.model, hidden_dim=32, num_queries=9, dropout=0.3))
    assert adopt_model_config(other, tmp_path).model == replace(tiny_config.model, dropout=0.3)


def test_a_run_may_add_a_mask_head_to_the_registered_model(
    tiny_config: RunConfig, masks_config: RunConfig, tmp_path: Path
) -> None:
    detector = replace(tiny_config, model=replace(masks_config.model, masks=False))
    before = registered(tmp_path, detector, CLASSES)
    config = adopt_model_config(replace(masks_config, initial="models:/tiny@best"), tmp_path)
    assert config.model == masks_config.model
    for name in ("detr-r50-masks", "finetune"):
        recipe = replace(RECIPES[name], initial="models:/tiny@best")
        asked = replace(recipe, model=replace(recipe.model, masks=True))
        assert adopt_model_config(asked, tmp_path).model == replace(masks_config.model, dropout=recipe.model.dropout)
    model, notes = initial_model(config, CLASSES, tmp_path)
    after, fresh = model.state_dict(), seeded(config, 4, seed=config.seed).state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.state_dict().items())
    added = after.keys() - before.state_dict().keys()
    assert {name.split(".")[0] for name in added} == {"bbox_attention", "mask_head"}
    assert all(torch.equal(after[name], fresh[name]) for name in added)
    assert notes == ("starting from models:/tiny@best; its mask head is new and starts from random weights",)


def test_a_registered_mask_head_is_kept(masks_config: RunConfig, tiny_config: RunConfig, tmp_path: Path) -> None:
    before = registered(tmp_path, masks_config, CLASSES)
    config = adopt_model_config(replace(tiny_config, initial="models:/tiny@best"), tmp_path)
    assert config.model.masks
    model, notes = initial_model(config, CLASSES, tmp_path)
    assert_same(model.state_dict(), before.state_dict())
    assert notes == ("starting from models:/tiny@best",)


@pytest.mark.parametrize("masks", [False, True], ids=["detector", "with masks"])
def test_both_layouts_of_the_original_give_the_detector(masks_config: RunConfig, tmp_path: Path, masks: bool) -> None:
    before = seeded(replace(masks_config, model=replace(masks_config.model, masks=masks)), 4)
    save_file(to_original_state_dict(before), tmp_path / "w.safetensors")
    config = replace(masks_config, initial=str(tmp_path / "w.safetensors"))
    model, notes = initial_model(config, CLASSES, None)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.state_dict().items())
    assert ("its mask head is new" in notes[0]) is not masks
    other, notes = initial_model(config, CLASSES[:3], None)
    same = {name for name, value in before.state_dict().items() if torch.equal(other.state_dict()[name], value)}
    assert before.state_dict().keys() - same == {"class_embed.weight", "class_embed.bias"}
    assert "its class head was of other classes and starts afresh for 3" in notes[0]


def test_a_mask_head_needs_a_detector_of_the_same_classes(masks_config: RunConfig, tmp_path: Path) -> None:
    detector = replace(masks_config, model=replace(masks_config.model, masks=False))
    registered(tmp_path, detector, CLASSES)
    config = replace(masks_config, initial="models:/tiny@best", optim=replace(masks_config.optim, train="mask_head"))
    with pytest.raises(
        RunConfigError, match="knows other classes than the 3 of the data, but only the mask head"
    ) as caught:
        initial_model(config, CLASSES[:3], tmp_path)
    assert "\n" not in str(caught.value)
    assert initial_model(config, CLASSES, tmp_path)[0].config.masks


def test_frozen_modules_get_no_gradient(masks_config: RunConfig) -> None:
    head = build_trainable_model(replace(masks_config, optim=replace(masks_config.optim, train="mask_head")), 4)
    trained = {name.split(".")[0] for name, value in head.named_parameters() if value.requires_grad}
    assert trained == {"bbox_attention", "mask_head"}
    assert build_trainable_model(masks_config, 4).class_embed.weight.requires_grad


def test_a_shape_that_was_asked_for_is_not_dropped_silently(tiny_config: RunConfig, tmp_path: Path) -> None:
    registered(tmp_path, tiny_config, CLASSES)
    recipe = RECIPES["finetune"]
    free = replace(recipe.model, dropout=0.3, backbone_weights="random", num_queries=tiny_config.model.num_queries)
    assert adopt_model_config(replace(recipe, model=free), tmp_path).model.hidden_dim == tiny_config.model.hidden_dim
    asked = replace(recipe, model=replace(recipe.model, num_queries=300, decoder_layers=5))
    with pytest.raises(
        RunConfigError, match=r"--model\.decoder-layers, --model\.num-queries.*from --initial: leave out"
    ):
        adopt_model_config(asked, tmp_path)
