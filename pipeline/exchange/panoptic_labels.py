"""Labels of the original's panoptic models: category ids in 250 classes there, contiguous labels here."""

from __future__ import annotations

from collections.abc import Sequence

from detr.model import DETR, build_model
from detr.original import class_heads, load_original_state_dict, to_original_state_dict, with_class_rows
from shards.dataset.categories import UNNAMED, Category

ORIGINAL_CLASSES = 250
"""The original's number of classes for things and stuff, above the largest id of COCO's."""

NEVER = -100.0
"""Logit of an id without a category in an exported file; its probability is below 1e-40."""


def is_panoptic(categories: Sequence[Category]) -> bool:
    """Return True if categories are things and stuff."""
    return any(category.isthing is not None for category in categories)


def is_export_of_others(model: DETR, categories: Sequence[Category]) -> bool:
    """Return True if the model was exported here with other classes than the named ones of `categories`."""
    state = to_original_state_dict(model)
    bias = next(state[name] for name in class_heads(state) if name.endswith("bias"))[: len(categories)]
    exported = (bias > NEVER / 2).tolist()
    return not all(exported) and exported != [category.name != UNNAMED for category in categories]


def with_contiguous_labels(model: DETR, categories: Sequence[Category]) -> tuple[DETR, tuple[Category, ...]]:
    """Return the model with the class rows of named categories only, and these categories.

    `categories` has one for each label. Rows of ids without a category, which the original never trains towards, are left
    out; "no object" stays the last.
    """
    named = [label for label, category in enumerate(categories) if category.name != UNNAMED]
    rows = [*named, -1] if model.no_object else named
    state = with_class_rows(model, to_original_state_dict(model), lambda _, values: values[rows])
    contiguous = build_model(model.config, len(named))
    load_original_state_dict(contiguous, state)
    return contiguous.train(model.training), tuple(categories[label] for label in named)
