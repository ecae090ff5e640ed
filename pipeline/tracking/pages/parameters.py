"""Parameters of a run in MLflow: the options that people compare, and those that differ from the recipe.

MLflow writes all parameters of a run above each of its pictures and into each row of its lists, so they are few. The
whole configuration is an artifact of the run, which `detr resume` and everything else reads.
"""

from __future__ import annotations

from pipeline.config import RunConfig, flatten
from pipeline.recipes import RECIPES

COMPARED = (
    *("recipe", "seed", "model.backbone"),
    *("optim.batch_size", "optim.epochs", "optim.lr", "compute.precision", "cluster.workers"),
)
"""Options that every run has as parameters; what else the recipe says, its name says."""
_PLACES = ("storage", "track.", "data.train", "data.val", "data.built_in", "data.cache", "checkpoint.store")


def parameters(config: RunConfig) -> dict[str, str]:
    """Return the parameters of a run, by the paths of their options."""
    values = flatten(config)
    names = [*COMPARED, *(name for name in differing(config) if name not in COMPARED)]
    return {name: values[name] or "-" for name in names}


def differing(config: RunConfig) -> dict[str, tuple[str, str]]:
    """Return the options that differ from those of the recipe, or else from the defaults: this value, and theirs.

    Names and places are left out: the page of a run has them.
    """
    recipe = RECIPES.get(config.recipe)
    usual = flatten(recipe or RunConfig(recipe=config.recipe))
    return {
        name: (value, usual[name])
        for name, value in flatten(config).items()
        if not name.startswith(_PLACES) and not _is_same(value, usual[name])
    }


def _is_same(value: str, usual: str) -> bool:
    """Return whether two values are equal; the path of a recipe is absolute in a run."""
    return value == usual or (bool(usual) and value.endswith(f"/{usual}"))
