"""The built-in demonstration: every stage of the product on a laptop, in minutes, without a network.

It trains a small DETR, not the paper's; its backbone is pre-trained on the same synthetic images instead of ImageNet. Every
stage is the real one: JPEG files and COCO JSON, shards, two Ray Train workers, MLflow, the registry, and an evaluation of
the registered version.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from pipeline.config import RunConfig
from pipeline.pretrain import pretrain_backbone
from pipeline.progress import progress_bar
from pipeline.recipes import RECIPES
from pipeline.report import metrics_table
from pipeline.train import Launch, train
from shards import storage
from shards.config import WriteConfig
from shards.manifest import MANIFEST_NAME, load_manifest
from shards.synthetic import write_synthetic
from shards.write import write_coco

SUMMARY_NAME = "summary.json"
_SAMPLES_PER_SHARD = 1000


@dataclass(frozen=True)
class Summary:
    """Results of the demo, as written to `runs/demo/summary.json`."""

    AP: float
    """AP of the run's best checkpoint."""
    AP50: float
    evaluated_AP: float
    """AP of the registered version."""
    version: str
    seconds: float
    model: str
    run_id: str


def demo(launch: Launch | None = None) -> Summary:
    """Generate, shard, pre-train, train, register, evaluate and draw; return the results and write them to a file."""
    from pipeline.registered import evaluate_registered, picture_sheet

    launch, start = launch or Launch(), time.perf_counter()
    config = RECIPES["demo"]
    folder = Path(config.storage) / "demo"
    launch.say("A small DETR on built-in synthetic images. Its backbone is pre-trained on the same images")
    launch.say("instead of ImageNet. Two Ray Train workers on this CPU.\n")
    outcome = train(config, launch)
    uri = f"models:/{outcome.model_name}/{outcome.version}"
    launch.say(f"registered as {uri}{' (@best)' if outcome.is_best else ''}; evaluating it from the registry")
    evaluation = evaluate_registered(uri, config.data.val, progress=True)
    sheet = folder / "detections.png"
    picture_sheet(evaluation.detections, load_manifest(config.data.val)).save(sheet)
    summary = Summary(
        AP=outcome.metrics["AP"],
        AP50=outcome.metrics["AP50"],
        evaluated_AP=evaluation.score.metrics["AP"],
        version=outcome.version,
        seconds=round(time.perf_counter() - start, 1),
        model=uri,
        run_id=outcome.run_id,
    )
    (folder / SUMMARY_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n")
    launch.say("\n" + metrics_table(evaluation.score.metrics))
    launch.say(
        f"\nin {summary.seconds:.0f} s; the run logged AP {summary.AP:.6f}, its registered version gives {summary.evaluated_AP:.6f}"
    )
    launch.say(f"pictures   {sheet} (detections next to the truth)")
    launch.say(f"figures    {folder / SUMMARY_NAME}")
    launch.say("in MLflow  detr ui")
    return summary


def make_built_in(config: RunConfig, say: Callable[[str], None]) -> None:
    """Generate the built-in data set and pre-train its backbone, unless they exist."""
    _make_data(config, say)
    weights = Path(config.model.backbone_weights)
    if config.model.backbone_weights in ("random", "imagenet") or weights.exists():
        return
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


def _make_data(config: RunConfig, say: Callable[[str], None]) -> None:
    urls = (config.data.train, config.data.val)
    if all(storage.exists(storage.join(url, MANIFEST_NAME)) for url in urls):
        return
    source = Path(config.data.train).parent / "source"
    with progress_bar("drawing images") as progress:
        drawn = write_synthetic(source, progress=progress)
    images = 0
    for split, url in zip((drawn.train, drawn.val), urls, strict=True):
        with progress_bar(f"sharding {Path(url).name}") as progress:
            manifest = write_coco(
                split.images, split.annotations, url, WriteConfig(samples_per_shard=_SAMPLES_PER_SHARD), progress
            )
        images += manifest.images
    say(f"drew and sharded {images} images in {source.parent}")
