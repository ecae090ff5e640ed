"""Models from which runs of tests start."""

from pathlib import Path

import torch
from torch import Tensor

from detr.model import DETR, build_model
from pipeline.config import RunConfig
from pipeline.registry.card import write_folder
from shards.dataset.categories import Category
from tests.support.cards import make_card

CLASSES = tuple(Category(number, name) for number, name in enumerate("abcd", start=1))


def seeded(config: RunConfig, classes: int, seed: int = 7) -> DETR:
    """Return a model of random weights."""
    torch.manual_seed(seed)
    return build_model(config.model, classes)


def registered(folder: Path, config: RunConfig, categories: tuple[Category, ...]) -> DETR:
    """Write a model to `folder` as the registry keeps it."""
    model = seeded(config, len(categories))
    card = make_card(config.model, config.transform, categories, recipe="tiny")
    write_folder(folder, model, card)
    return model


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Check that names and values are equal."""
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
