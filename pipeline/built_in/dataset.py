"""The built-in data set, made where a run's data is absent."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from pipeline.built_in.pretrain import pretrain_backbone
from pipeline.config import RunConfig
from pipeline.display.terminal import progress_bar
from pipeline.recipes import RECIPES
from shards.config import WriteConfig
from shards.dataset.manifest import MANIFEST_NAME, Manifest, load_manifest
from shards.panoptic.built_in import write_synthetic_panoptic
from shards.store import storage
from shards.synthetic import write_synthetic
from shards.workers import Progress
from shards.write.writer import write_coco, write_panoptic

_SAMPLES_PER_SHARD = 1000


def is_made(config: RunConfig) -> bool:
    """Return True if what the run uses of the demo exists, so that `make_built_in` has nothing to do."""
    return _has_weights(config) and (_has_data(config) or not config.data.built_in)


def _has_data(config: RunConfig) -> bool:
    return all(storage.exists(storage.join(url, MANIFEST_NAME)) for url in (config.data.train, config.data.val))


def _has_weights(config: RunConfig) -> bool:
    weights = config.model.backbone_weights
    return weights in ("random", "imagenet") or Path(weights).exists()


def make_built_in(config: RunConfig, say: Callable[[str], None]) -> None:
    """Generate the built-in data set and pre-train its backbone, unless they exist.

    For a run on other data, this is done only if the demo's backbone, from which it starts, is absent.
    """
    if not config.data.built_in:
        if _has_weights(config):
            return
        say("the demo's backbone, from which this run starts, is made once: on built-in images, in minutes")
        config = RECIPES["demo"]
    make_data(config, say)
    if _has_weights(config):
        return
    weights = Path(config.model.backbone_weights)
    with progress_bar("pre-training the backbone", "step") as progress:
        result = pretrain_backbone(
            load_manifest(config.data.train),
            config.model,
            config.transform,
            weights,
            seed=config.seed,
            progress=lambda done, total, loss: progress(done, total),
        )
    say(
        f"pre-trained the backbone in {result.steps} steps: it classifies {result.accuracy:.0%} of the points correctly"
    )


def make_data(config: RunConfig, say: Callable[[str], None]) -> None:
    """Generate and shard the built-in data set, unless it exists."""
    if _has_data(config):
        return
    urls = (config.data.train, config.data.val)
    source = Path(config.data.train).parent / "source"
    write = WriteConfig(samples_per_shard=_SAMPLES_PER_SHARD)
    with progress_bar("drawing images") as progress:
        sharders = _draw(source, config.data.built_in_stuff, progress)
    images = 0
    for shard, url in zip(sharders, urls, strict=True):
        with progress_bar(f"sharding {Path(url).name}") as progress:
            images += shard(out=url, config=write, progress=progress).images
    say(f"drew and sharded {images} images in {source.parent}")


def _draw(source: Path, stuff: bool, progress: Progress) -> tuple[Callable[..., Manifest], ...]:
    """Draw the images, with or without stuff, and return the function that shards each split."""
    if stuff:
        drawn = write_synthetic_panoptic(source, progress=progress)
        return tuple(partial(write_panoptic, *vars(split).values()) for split in (drawn.train, drawn.val))
    shapes = write_synthetic(source, progress=progress)
    return tuple(partial(write_coco, *vars(split).values()) for split in (shapes.train, shapes.val))
