"""Options of the recipe `small`, chosen by the training data: a few hundred images of one's own, trained on a laptop.

The choices become ordinary options of the run, so what resumes or evaluates it sees plain numbers, and the same command
with the same data makes the same run. An option that the user gave is never changed, and the others follow it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from pipeline.config import RunConfig
from shards.arrays import Ints
from shards.dataset.manifest import Manifest

_SIDES = (192, 256)
"""Shorter sides in pixels that a CPU trains in minutes; the second if objects would be too small in the first."""
_CELL = 8
"""Side in pixels of the finest cells of the model."""
_FEWEST_QUERIES = 20


class Fitted(NamedTuple):
    """Configuration that suits the data, and a line about each choice: the flags that it stands for, and the reason."""

    config: RunConfig
    reasons: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Facts:
    """Facts about the training data; crowd regions left out."""

    images: int
    sides: Ints
    """Shorter and longer side of each image in pixels, [images, 2]."""
    median_side: int
    """Median of the shorter sides."""
    most_objects: int
    """Number of objects in the image that has the most."""
    small_object: float
    """Side of an object that is larger than a quarter of them, as a fraction of its image's shorter side; 1 if none."""


class _Choice(NamedTuple):
    values: Mapping[str, Any]
    reason: str


def fit_small(config: RunConfig, train: Manifest, given: Collection[str] = ()) -> Fitted:
    """Return the configuration with sizes, queries, batch, rates and epochs for the training data `train`.

    given: paths of the options that the user set, such as `optim.epochs`, which stay as they are in `config`.
    """
    facts, reasons = _facts(train), []
    for rule in _RULES:
        choice = rule(config, facts)
        free = {name: value for name, value in choice.values.items() if name not in given}
        if free:
            config = _with(config, free)
            flags = " ".join(f"--{name.replace('_', '-')} {_text(value)}" for name, value in free.items())
            reasons.append(f"{flags}: {choice.reason}")
    return Fitted(config, tuple(reasons))


def _facts(train: Manifest) -> _Facts:
    index = train.index()
    sides = np.sort(np.stack([index.images["width"], index.images["height"]], 1).astype(np.int64), 1)
    objects = index.annotations[index.annotations["iscrowd"] == 0]
    roots = np.sqrt(objects["bbox"][:, 2:].clip(min=0).prod(1)) / sides[objects["image"], 0]
    return _Facts(
        images=train.images,
        sides=sides,
        median_side=int(np.median(sides[:, 0])),
        most_objects=index.max_boxes,
        small_object=float(np.quantile(roots, 0.25)) if len(roots) else 1.0,
    )


def _size(config: RunConfig, facts: _Facts) -> _Choice:
    larger = facts.small_object * _SIDES[0] < _CELL
    most = _SIDES[larger]
    side = max(64, min(most, facts.median_side // 16 * 16))
    if side < most:
        reason = f"as large as half of the images, whose median shorter side is {facts.median_side} px"
    elif larger:
        reason = f"a quarter of the objects would be smaller than {_CELL} px at {_SIDES[0]} px"
    else:
        quarter = round(facts.small_object * side)
        reason = f"quick on a CPU, and three quarters of the objects are {quarter} px or more there"
    return _Choice({"transform.eval_size": side}, reason)


def _scales(config: RunConfig, facts: _Facts) -> _Choice:
    side = config.transform.eval_size
    scales = tuple(round(side * twelfths / 96) * 8 for twelfths in (10, 11, 12, 13))
    values = {"transform.train_scales": scales, "transform.max_size": max(side * 5 // 3, scales[-1])}
    return _Choice(
        values, "10 to 13 twelfths of the size for evaluation, and up to 5/3 as long as high, as in the paper"
    )


def _queries(config: RunConfig, facts: _Facts) -> _Choice:
    if config.initial:  # the model has its shape
        return _Choice({}, "")
    wanted = max(_FEWEST_QUERIES, math.ceil(1.5 * facts.most_objects / 10) * 10)
    cells = _fewest_cells(config, facts.sides)
    reason = f"an image has up to {facts.most_objects} objects, and half as many queries more find them sooner"
    if wanted > cells:
        reason = f"an image has up to {facts.most_objects} objects, and the smallest {cells} cells for queries"
    return _Choice({"model.num_queries": min(wanted, cells)}, reason)


def _fewest_cells(config: RunConfig, sides: Ints) -> int:
    """Return the number of cells of the image that has the fewest, in the smallest of its sizes.

    With two stages, each query is one of these cells.
    """
    transform = config.transform
    smallest = min(*transform.train_scales, transform.eval_size)
    scale = np.minimum(smallest / sides[:, 0], transform.max_size / sides[:, 1])[:, None]
    pixels = np.maximum(np.floor(sides * scale), 1)
    strides = [_CELL * 2**level for level in range(config.model.deformable.levels)]
    return int(sum(np.ceil(pixels / stride).prod(1) for stride in strides).min())


def _batch(config: RunConfig, facts: _Facts) -> _Choice:
    few = facts.images < 1000
    reason = f"{facts.images:,} images; small batches make more steps of {'few' if few else 'some thousand'} images"
    return _Choice({"optim.batch_size": 8 if few else 16}, reason)


def _rates(config: RunConfig, facts: _Facts) -> _Choice:
    batch = config.optim.batch_size
    rate = float(f"{1e-3 * math.sqrt(batch / 16):.1e}")
    reason = f"1e-3 for 16 images, which the demo is trained with, times the root of {batch} / 16"
    return _Choice({"optim.lr": rate, "optim.lr_backbone": rate / 2}, reason)


def _epochs(config: RunConfig, facts: _Facts) -> _Choice:
    epochs = min(300, max(12, round(500 / math.sqrt(max(facts.images, 1)))))
    reason = f"{facts.images:,} images; 500 divided by their root, so that four times as many take twice as long"
    return _Choice({"optim.epochs": epochs}, reason)


def _schedule(config: RunConfig, facts: _Facts) -> _Choice:
    epochs = config.optim.epochs
    warm_up = round(min(100 * config.optim.batch_size / max(facts.images, 1), epochs / 10), 2)
    values = {
        "optim.decay_epoch": epochs // 3,
        "optim.warmup_epochs": warm_up,
        "evaluate.every": math.ceil(epochs / 10),
    }
    return _Choice(values, "a third of the epochs at the full rate after 100 steps of warm-up, and ten evaluations")


_RULES: tuple[Callable[[RunConfig, _Facts], _Choice], ...] = (
    _size,
    _scales,
    _queries,
    _batch,
    _rates,
    _epochs,
    _schedule,
)


def _with(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Return the configuration with options of its sections, by their paths."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, _, option = name.partition(".")
        sections.setdefault(section, {})[option] = value
    return replace(config, **{name: replace(getattr(config, name), **options) for name, options in sections.items()})


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
