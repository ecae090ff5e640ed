"""The built-in demonstration: every stage of the product on a laptop, in minutes, without a network.

It trains a small DETR, not the paper's; its backbone is pre-trained on the same synthetic images instead of ImageNet.
Every stage is the real one: JPEG files and COCO JSON, shards, two Ray Train workers, MLflow, the registry, and an
evaluation of the registered version.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from pipeline.display.tables import metrics_table
from pipeline.recipes import RECIPES
from pipeline.tracking.pages.links import run_link
from pipeline.train import Launch, train
from shards.dataset.manifest import load_manifest

SUMMARY_NAME = "summary.json"


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
    from pipeline.display.pictures import picture_sheet
    from pipeline.inference.evaluate import evaluate

    launch, start = launch or Launch(), time.perf_counter()
    config = RECIPES["demo"]
    folder = Path(config.storage) / "demo"
    launch.say("A small DETR on built-in synthetic images. Its backbone is pre-trained on the same images")
    launch.say("instead of ImageNet. Two Ray Train workers on this CPU.\n")
    outcome = train(config, launch)
    uri = f"models:/{outcome.model_name}/{outcome.version}"
    launch.say(f"registered as {uri}{' (@best)' if outcome.is_best else ''}; evaluating it from the registry")
    evaluation = evaluate(uri, config.data.val, progress=True)
    sheet = folder / "detections.png"
    picture_sheet(load_manifest(config.data.val), evaluation.detections).save(sheet)
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
        f"\nin {summary.seconds:.0f} s; the run logged AP {summary.AP:.6f}, its registered version gives "
        f"{summary.evaluated_AP:.6f}"
    )
    launch.say(f"pictures   {sheet} (detections next to the truth)")
    launch.say(f"figures    {folder / SUMMARY_NAME}")
    launch.say(f"in MLflow  {run_link(outcome.experiment_id, outcome.run_id)}")
    return summary
