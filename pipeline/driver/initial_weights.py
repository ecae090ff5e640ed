"""Initial weights of a run, made once by the driver and written into the run's folder.

Workers only read that file: they need no network, a missing file or an unreachable host shows before the cluster is
paid for, and the run keeps its initial weights. Random weights are never a fallback; they must be requested.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor

from detr.config import ModelConfig
from detr.mask_head import MASK_MODULES
from detr.model import DETR, build_model
from detr.original import (
    class_heads,
    load_backbone_weights,
    load_detector_state_dict,
    load_original_state_dict,
    to_original_state_dict,
    with_class_rows,
)
from pipeline.config import RunConfig
from pipeline.errors import RunConfigError
from pipeline.exchange.state_file import read_state_file
from pipeline.recipes import RECIPES
from pipeline.registry.card import WEIGHTS_NAME, read_card
from shards.dataset.categories import UNNAMED, Category, identities
from shards.errors import one_line


def adopt_model_config(config: RunConfig, folder: Path) -> RunConfig:
    """Return the configuration with the architecture of the registered model in `folder`, from which the run starts.

    A run may add masks to it. Raise `RunConfigError` naming the fields that were set to another architecture.
    """
    card = read_card(folder)
    if config.recipe in RECIPES:
        _refuse_other_shape(config.model, RECIPES[config.recipe].model, card.model)
    masks = config.model.masks or card.model.masks
    return replace(config, model=replace(card.model, dropout=config.model.dropout, masks=masks))


def _refuse_other_shape(given: ModelConfig, recipe: ModelConfig, card: ModelConfig) -> None:
    """Raise `RunConfigError` if the user set a field of the architecture, which differs from recipe and card."""
    # Dropout is the run's own, the backbone's weights come with the others, and a mask head may be added.
    free = ("dropout", "backbone_weights", "masks")
    names = [field.name for field in fields(given) if field.name not in free]
    refused = [name for name in names if getattr(given, name) not in (getattr(recipe, name), getattr(card, name))]
    if refused:
        flags = ", ".join(f"--model.{name.replace('_', '-')}" for name in refused)
        raise RunConfigError(
            f"{flags} differs from the model that --initial names; the shape comes from --initial: leave out {flags}"
        )


def initial_model(
    config: RunConfig, categories: Sequence[Category], resolved: Path | None
) -> tuple[DETR, tuple[str, ...]]:
    """Build the model with the run's initial weights; return it and lines about them for the user.

    `resolved` is the folder of the registered model in `config.initial`, or None.
    """
    torch.manual_seed(config.seed)
    model = build_model(config.model, len(categories))
    if config.initial:
        return model, _load_initial(model, config, categories, resolved)
    return model, _load_backbone(model, config.model)


def _load_initial(
    model: DETR, config: RunConfig, categories: Sequence[Category], resolved: Path | None
) -> tuple[str, ...]:
    state = dict(_read_state(resolved / WEIGHTS_NAME if resolved else Path(config.initial), "initial"))
    known = identities(read_card(resolved).categories) if resolved else None
    classes = identities(categories)
    heads = class_heads(state)
    rows = next((len(state[name]) for name in heads), None)
    # Imported models have labels without a category, which are no classes: keep only the rows of the others.
    named = [label for label, category in enumerate(known or ()) if category[1] != UNNAMED]
    if known and len(named) < len(known) and tuple(known[label] for label in named) == classes:
        known = classes
        kept = [*named, -1] if model.no_object else named
        state = with_class_rows(model, state, lambda _, values: values[kept])
    same = known == classes if known else rows == len(categories) + model.no_object
    if not same and rows is not None:  # a state without a class head is no DETR: loading it below raises
        if config.optim.train == "mask_head":
            raise RunConfigError(
                f"--initial {config.initial} knows other classes than the {len(categories)} of the data, but only the "
                "mask head trains; expected a detector of the same classes: fine-tune one first, or give "
                "--optim.train all"
            )
        # The parameters of the detector have a prefix in a model with masks.
        fresh = to_original_state_dict(model) | model.state_dict()
        fresh |= {f"detr.{name}": fresh[name] for name in class_heads(fresh)}
        state = with_class_rows(model, state, lambda name, values: fresh.get(name, values).clone())
    new_mask_head = model.config.masks and not any(key.startswith(MASK_MODULES) for key in state)
    try:
        if new_mask_head:
            load_detector_state_dict(model, state)
        else:
            load_original_state_dict(model, state)
    except ValueError as error:
        raise RunConfigError(f"--initial {config.initial}: {error}") from None
    note = f"starting from {config.initial}"
    if not same:
        note += f"; its class head was of other classes and starts afresh for {len(categories)}"
    if new_mask_head:
        note += "; its mask head is new and starts from random weights"
    return (note,)


def _load_backbone(model: DETR, config: ModelConfig) -> tuple[str, ...]:
    if config.backbone_weights == "random":
        return ("the backbone starts from random weights, as asked",)
    if config.backbone_weights == "imagenet":
        load_backbone_weights(model, _imagenet(config.backbone))
        return (f"the backbone starts from torchvision's ImageNet weights of {config.backbone}",)
    try:
        load_backbone_weights(model, _read_state(Path(config.backbone_weights), "model.backbone-weights"))
    except ValueError as error:
        raise RunConfigError(f"--model.backbone-weights {config.backbone_weights}: {error}") from None
    return (f"the backbone starts from {config.backbone_weights}",)


def _imagenet(backbone: str) -> Mapping[str, Tensor]:
    """Return torchvision's ImageNet weights, downloaded or cached: V1, as in the original."""
    from torchvision.models import get_weight

    names = {"resnet18": "ResNet18", "resnet34": "ResNet34", "resnet50": "ResNet50", "resnet101": "ResNet101"}
    if backbone not in names:
        raise RunConfigError(
            f"there are no ImageNet weights of backbone {backbone!r}; expected one of {', '.join(names)}: "
            "give --model.backbone-weights PATH or random"
        )
    weights = get_weight(f"{names[backbone]}_Weights.IMAGENET1K_V1")
    logging.getLogger(__name__).info("loading %s", weights.url)
    try:
        # torch announces a download on stderr; after a failure only the line below should be shown.
        with contextlib.redirect_stderr(io.StringIO()):
            state: Mapping[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True)
        return state
    except (OSError, RuntimeError) as error:
        raise RunConfigError(
            f"torchvision's ImageNet weights of {backbone} could not be fetched ({one_line(error)}); expected "
            "a network or a file: give --model.backbone-weights PATH, or `random` if that is what you want"
        ) from None


def _read_state(path: Path, option: str) -> Mapping[str, Tensor]:
    try:
        return read_state_file(path).state
    except ValueError as error:
        raise RunConfigError(f"--{option} {path}: {error}") from None
