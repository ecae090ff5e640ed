"""The few options of a run that are parameters in MLflow."""

from dataclasses import replace

from pipeline.recipes import RECIPES
from pipeline.tracking.pages.parameters import COMPARED, differing, parameters

R50, DEMO = RECIPES["detr-r50"], RECIPES["demo"]


def test_a_recipe_has_the_options_that_people_compare_and_no_more() -> None:
    assert tuple(parameters(R50)) == COMPARED
    assert len(COMPARED) == 8
    assert parameters(R50)["optim.lr"] == "0.0001"


def test_what_differs_from_the_recipe_is_a_parameter_too() -> None:
    changed = replace(R50, loss=replace(R50.loss, eos_coef=0.2), optim=replace(R50.optim, lr=2e-4))
    assert differing(changed) == {"loss.eos_coef": ("0.2", "0.1"), "optim.lr": ("0.0002", "0.0001")}
    assert set(parameters(changed)) - set(COMPARED) == {"loss.eos_coef"}
    other = replace(R50, model=replace(R50.model, num_queries=50), optim=replace(R50.optim, lr_backbone=0.0))
    assert set(parameters(other)) - set(COMPARED) == {"model.num_queries", "optim.lr_backbone"}


def test_names_and_places_are_no_parameters() -> None:
    moved = replace(
        DEMO,
        storage="/elsewhere",
        data=replace(DEMO.data, train="/x/train", cache="/c"),
        track=replace(DEMO.track, run_name="mine"),
        model=replace(DEMO.model, backbone_weights=f"/elsewhere/{DEMO.model.backbone_weights}"),
    )
    assert differing(moved) == {}


def test_a_configuration_without_a_recipe_is_compared_with_the_defaults() -> None:
    own = replace(R50, recipe="mine", seed=7)
    assert differing(own)["seed"] == ("7", "42")
