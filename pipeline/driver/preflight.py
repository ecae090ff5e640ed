"""Checks of a run on the machine that starts it, before a cluster is paid for.

Paths become absolute here, so that workers and later resumes use the same files. `detr submit` runs the checks that
need no model (`check`) before it sends anything, so torch is imported only where a model is built.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.checkpoint import location
from pipeline.checkpoint.location import Location
from pipeline.config import RunConfig
from pipeline.data.datasets import check_cache_limit, open_data
from pipeline.driver.changes import absolute_cache
from pipeline.errors import RunConfigError
from pipeline.recipes import DEMO, uses_built_in, uses_demo_backbone
from pipeline.schedule import Schedule
from pipeline.tracking.pages.data import DataSet, data_set
from shards.dataset.categories import identities
from shards.dataset.manifest import Manifest
from shards.dataset.verify import check_sizes
from shards.errors import ShardError
from shards.read.segmentations import check_segmentations
from shards.store import storage

if TYPE_CHECKING:
    from detr.model import DETR


@dataclass(frozen=True)
class PreparedRun:
    """Checked run: its data, its schedule, its initial weights and lines about them for the user."""

    train: Manifest
    val: Manifest
    schedule: Schedule
    model: DETR
    notes: tuple[str, ...]

    @property
    def datasets(self) -> dict[str, DataSet]:
        """Facts about the data, by its use."""
        return {"training": data_set(self.train), "validation": data_set(self.val)}

    def write_initial_weights(self, folder: Location) -> None:
        """Write the initial weights to the run's location, where the workers read them."""
        from pipeline.training.model import save_initial

        save_initial(self.model, folder)


def check(config: RunConfig, *, data: bool = True) -> None:
    """Check the initial weights and the data of a run as far as this needs no model and no download.

    Built-in data may be missing, because it is generated where the run starts; with `data=False` all data may be, because
    only a cluster sees it. Raise one of `USER_ERRORS`.
    """
    _check_initial(config)
    if data and not config.data.built_in:
        check_data(config)


def check_data(config: RunConfig) -> None:
    """Check that both data sets are complete, of the recipe's kind and of the same categories, with masks if needed."""
    _check_masks(config, *_checked_data(config))


def prepare(config: RunConfig, say: Callable[[str], None]) -> tuple[RunConfig, PreparedRun]:
    """Check the run and build its initial model.

    Return the configuration with absolute paths, and with version and architecture of the registered model if it starts
    from one. Raise one of `USER_ERRORS`, each one line.
    """
    from pipeline.driver.initial_weights import adopt_model_config, initial_model

    _check_initial(config)
    if uses_built_in(config):
        from pipeline.built_in.dataset import make_built_in

        make_built_in(config, say)
    config = _absolute(config)
    train, val = _checked_data(config)
    with tempfile.TemporaryDirectory() as fetched:
        resolved = None
        if config.initial.startswith("models:/"):
            from pipeline.registry.versions import pinned, resolve

            config = replace(config, initial=pinned(config.initial))
            resolved = resolve(config.initial, Path(fetched))
            config = adopt_model_config(config, resolved)
        _check_masks(config, train, val)
        _warn_of_queries(config, train, say)
        model, notes = initial_model(config, train.categories, resolved)
    for line in notes:
        say(line)
    schedule = Schedule(config.optim, train.images, config.data.epoch_tail)
    if config.compute.graphs:
        from pipeline.data.canvases import choose_canvases

        say(str(choose_canvases(train, config, schedule, config.cluster.workers)))
    return config, PreparedRun(train, val, schedule, model, notes)


def check_storage(config: RunConfig) -> None:
    """Raise one of `USER_ERRORS` if what the run leaves, or its checkpoints, could not be written."""
    _check_place(config.storage, "storage")
    if config.checkpoint.store:
        _check_place(config.checkpoint.store, "checkpoint.store")


def _check_place(url: str, name: str) -> None:
    try:
        place = location.location(url)
    except ShardError as error:
        raise RunConfigError(f"{name} {error}") from None
    if isinstance(place, Path):
        _check_folder(place.absolute(), name)
    else:
        location.check(str(place), name)


def _check_folder(folder: Path, name: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        problem = "is a file" if folder.is_file() else f"cannot be written ({error.strerror})"
        raise RunConfigError(
            f"{name} {folder} {problem}; expected a folder that every worker may write: give another --{name}"
        ) from None


def _absolute(config: RunConfig) -> RunConfig:
    data = replace(
        config.data,
        train=storage.absolute(config.data.train),
        val=storage.absolute(config.data.val),
        cache=absolute_cache(config.data.cache),
    )
    weights = config.model.backbone_weights
    if weights not in ("imagenet", "random"):
        weights = str(Path(weights).absolute())
    initial, store = config.initial, config.checkpoint.store
    if initial and not initial.startswith("models:/"):
        initial = str(Path(initial).absolute())
    return replace(
        config,
        data=data,
        initial=initial,
        storage=storage.absolute(config.storage),
        checkpoint=replace(config.checkpoint, store=store and storage.absolute(store)),
        model=replace(config.model, backbone_weights=weights),
    )


def _check_initial(config: RunConfig) -> None:
    if config.recipe == "finetune" and not config.initial:
        raise RunConfigError(
            "finetune has no weights to start from; finetune needs --initial models:/NAME@ALIAS or FILE"
        )
    if uses_demo_backbone(config) and config.model.backbone != DEMO.model.backbone:
        raise RunConfigError(
            f"model.backbone is {config.model.backbone!r} and model.backbone_weights are those of the demo's backbone; "
            "expected weights of this one: add --model.backbone-weights imagenet"
        )
    if config.optim.train == "mask_head" and not config.initial:
        raise RunConfigError(
            "optim.train is 'mask_head' but there is no detector to put it on; expected one: give --initial "
            "models:/NAME@ALIAS or FILE, or --optim.train all"
        )


def _check_masks(config: RunConfig, train: Manifest, val: Manifest) -> None:
    """Check that a model with masks finds segmentations, in training up to `data.max_bad_samples` exceptions."""
    if config.model.masks:
        check_segmentations(train, config.data.max_bad_samples)
        check_segmentations(val)


def _checked_data(config: RunConfig) -> tuple[Manifest, Manifest]:
    train, val = open_data(config.data)
    check_sizes(train)
    check_sizes(val)
    _check_categories(train, val)
    _check_panoptic(config, train)
    check_cache_limit(config.data, train, val)
    return train, val


def _check_categories(train: Manifest, val: Manifest) -> None:
    of_train, of_val = (identities(manifest.categories, kinds=True) for manifest in (train, val))
    if of_train != of_val:
        differing = set(of_train) ^ set(of_val)
        first = min(differing, key=lambda identity: identity[:2]) if differing else of_train[0]
        raise RunConfigError(
            f"{train.url} and {val.url} differ in {len(differing)} categories, such as {first[0]} {first[1]!r}; "
            "expected the same categories in both: shard both from one list"
        )


def _check_panoptic(config: RunConfig, train: Manifest) -> None:
    """Raise `RunConfigError` for a recipe of things and stuff on data of boxes, whose model would have no PQ."""
    if "panoptic" in config.recipe and not train.panoptic:
        raise RunConfigError(
            f"{train.url} is data of boxes; {config.recipe} expects panoptic data: write it with `detr shard "
            "coco-panoptic`, or train detr-r50, and detr-r50-masks for masks"
        )


def _warn_of_queries(config: RunConfig, train: Manifest, say: Callable[[str], None]) -> None:
    """Warn if images have more boxes than queries: a query finds at most one object, so the rest is never matched."""
    boxes = train.index().boxes_per_image
    queries = config.model.num_queries
    lost = int((boxes - queries).clip(min=0).sum())
    if lost:
        say(
            f"warning: {lost} boxes in {int((boxes > queries).sum())} training images cannot be matched: the largest "
            f"image has {int(boxes.max())} boxes and model.num_queries is {queries}; raise --model.num-queries to "
            "learn them all"
        )
