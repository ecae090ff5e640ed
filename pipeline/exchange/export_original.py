"""Export of a registered version to the original's file format: `{"model": state dict}`, tensors only.

The original uses category ids as labels. A model trained here has contiguous labels, so the rows of its class head move
to their ids, and the rows of ids without a category get a logit that makes their probability negligible.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor

from detr.config import ModelConfig
from detr.original import to_original_state_dict, with_class_rows
from pipeline.errors import ExchangeError
from pipeline.exchange.panoptic_labels import NEVER, ORIGINAL_CLASSES, is_panoptic
from pipeline.registry.versions import read_version
from shards.dataset.categories import Category
from shards.store.storage import atomic_path

_MOST_CLASSES = 10_000  # a class head with more rows is a mistake
# Options that the original lacks and that change the results. How weights were initialised does not matter any more.
_DEPARTURES = ("position_temperature", "position_at_input", "decoder_input")

_DEFAULTS = {
    "detr": ModelConfig(),
    "deformable": ModelConfig(variant="deformable", num_queries=300, feedforward_dim=1024),
    "conditional": ModelConfig(variant="conditional", num_queries=300),
}
_VALUED = {
    "backbone": "--backbone",
    "position": "--position_embedding",
    "encoder_layers": "--enc_layers",
    "decoder_layers": "--dec_layers",
    "feedforward_dim": "--dim_feedforward",
    "hidden_dim": "--hidden_dim",
    "heads": "--nheads",
    "num_queries": "--num_queries",
    "deformable.levels": "--num_feature_levels",
    "deformable.encoder_points": "--enc_n_points",
    "deformable.decoder_points": "--dec_n_points",
    "deformable.one_to_many_queries": "--num_queries_one2many",
}
_FLAGS = {
    "dilation": "--dilation",
    "pre_norm": "--pre_norm",
    "masks": "--masks",
    "deformable.box_refine": "--with_box_refine",
    "deformable.two_stage": "--two_stage",
    "deformable.mixed_selection": "--mixed_selection",
    "deformable.look_forward_twice": "--look_forward_twice",
}


def export_original(uri: str, path: Path) -> tuple[str, ...]:
    """Write a registered version in the original's format and return lines for the user.

    Raise `ExchangeError` naming the fields that the original cannot express.
    """
    check_target(path)
    model, card = read_version(uri)
    refuse_departures(uri, card.model)
    state = {name: value.detach().cpu().contiguous() for name, value in to_original_state_dict(model).items()}
    classes = _classes(uri, card.categories)
    labels = [category.id for category in card.categories]
    moved = labels != list(range(classes))
    if moved:

        def move(name: str, rows: Tensor) -> Tensor:
            empty = NEVER if name.endswith("bias") else 0.0
            return _at_ids(rows, labels, classes, empty, no_object=model.no_object)

        state = with_class_rows(model, state, move)
    with atomic_path(path) as temporary:
        torch.save({"model": state}, temporary)
    options = original_options(card.model)
    notes = [f"the original builds it with {' '.join(options)} and num_classes={classes}"]
    if moved:
        notes.append(f"its {len(labels)} labels are at their category ids now, in a head of {classes} classes")
    return tuple(notes)


def refuse_departures(uri: str, config: ModelConfig) -> None:
    """Raise `ExchangeError` if the original has no options for this model."""
    plain = ModelConfig()
    wrong = [name for name in _DEPARTURES if getattr(config, name) != getattr(plain, name)]
    if config.norm == "group":
        wrong.append("norm")
    if config.backbone == "tiny":
        wrong.append("backbone")
    if wrong:
        got = ", ".join(f"{name}={getattr(config, name)!r}" for name in wrong)
        expected = ", ".join("a ResNet" if name == "backbone" else f"{name}={getattr(plain, name)!r}" for name in wrong)
        raise ExchangeError(
            f"{uri} has {got}, which the original cannot express; expected {expected}: --onnx takes any model"
        )


def original_options(config: ModelConfig) -> list[str]:
    """Return the command-line options of the variant's original that build this model, without its defaults."""
    plain, valued = _DEFAULTS[config.variant], dict(_VALUED)
    if config.deformable.one_to_many_queries:
        valued["num_queries"] = "--num_queries_one2one"  # H-DETR's name
    values = {name: (attrgetter(name)(config), attrgetter(name)(plain)) for name in valued}
    options = [f"{valued[name]} {value}" for name, (value, default) in values.items() if value != default]
    return options + [flag for name, flag in _FLAGS.items() if attrgetter(name)(config)] or ["its defaults"]


def check_target(path: Path) -> None:
    """Raise `ExchangeError` if `path` cannot be written, before minutes of work."""
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ExchangeError(f"{path} cannot be written; expected a file in a folder that exists: make it first")


def _classes(uri: str, categories: Sequence[Category]) -> int:
    """Return the original's number of classes: the largest category id plus 1, of things and stuff at least 250."""
    ids = [category.id for category in categories]
    if min(ids) < 0 or max(ids) >= _MOST_CLASSES:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise ExchangeError(
            f"{uri} has category id {wrong}, and the original takes ids as labels; expected 0 to {_MOST_CLASSES - 1}"
        )
    return max(max(ids) + 1, ORIGINAL_CLASSES if is_panoptic(categories) else 0)


def _at_ids(rows: Tensor, ids: Sequence[int], classes: int, empty: float, *, no_object: bool) -> Tensor:
    """Move the rows [K, ...] of labels 0 to K - 1 to rows [classes, ...] at their category ids.

    With `no_object`, there is one more row before and after, which stays the last. Rows of ids without a category are
    filled with `empty`.
    """
    placed = rows.new_full((classes + no_object, *rows.shape[1:]), empty)
    placed[torch.tensor([*ids, classes] if no_object else ids)] = rows
    return placed
