"""Seconds of a run's own evaluation on two ranks, and the share that is not the forward pass, by each scorer.

The images are generated, the model is the demo's with 100 queries and its first weights, so each image has 100 detections. All
that a run does is measured, from the weights to the record beside the checkpoint: reading, forward passes, the detections of
both ranks brought together, scores, tables and pictures. Only the reasons of the score are left out: a thread finds them later.
"""

import functools
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detr.model import build_model
from pipeline.config import RunConfig
from pipeline.distributed.ranks import Ranks
from pipeline.evaluation import evaluate_model
from pipeline.recipes import RECIPES
from pipeline.training import loop, validation
from pipeline.training.model import save_initial
from pipeline.training.state import RunInfo
from shards.config import WriteConfig
from shards.synthetic import write_synthetic
from shards.write.writer import write_coco
from tests.support.ranks import run_ranks
from tests.support.tracker import MemoryTracker

Row = dict[str, Any]
QUERIES, RANKS = 100, 2
SCORERS = ("pycocotools", "hotcoco")


def evaluating(device: str, rounds: int) -> list[Row]:
    """Measure each scorer once, since pycocotools takes a minute; DETR_BENCH_IMAGES sets another number of images."""
    images = int(os.environ.get("DETR_BENCH_IMAGES", "5000"))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        made = write_synthetic(Path(folder) / "coco", train=4, val=images, size=96)
        for name, split in (("train", made.train), ("val", made.val)):
            write_coco(split.images, split.annotations, Path(folder) / name, WriteConfig())
        for scorer in SCORERS:
            ranks = run_ranks(RANKS, _evaluate, _config(Path(folder), scorer), timeout_s=600)
            rows.append(_row(images, scorer, ranks))
    return rows


def _config(folder: Path, scorer: str) -> RunConfig:
    demo = RECIPES["demo"]
    return replace(
        demo,
        storage=str(folder / scorer),
        model=replace(demo.model, num_queries=QUERIES, backbone_weights="random"),
        data=replace(demo.data, train=str(folder / "train"), val=str(folder / "val")),
        optim=replace(demo.optim, batch_size=2, max_steps=1),
        evaluate=replace(demo.evaluate, scorer=scorer, explain=False),  # type: ignore[arg-type]
    )


def _evaluate(ranks: Ranks, config: RunConfig) -> dict[str, float]:
    """Train a step and evaluate, in the loop of a run; return the seconds of each phase, and the images of this rank."""
    folder = Path(config.storage)
    if ranks.first:
        torch.manual_seed(0)
        save_initial(build_model(config.model, 4), folder)
    ranks.barrier()
    spent = {"forward": 0.0, "scores": 0.0, "whole": 0.0, "images": 0.0}

    def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(work)
        def call(*arguments: Any, **named: Any) -> Any:
            ranks.barrier()
            start = time.perf_counter()
            result = work(*arguments, **named)
            spent[name] += time.perf_counter() - start
            return result

        return call

    gathered = validation.gathered_model

    def observed(*arguments: Any) -> nn.Module:
        model, starts = gathered(*arguments), []

        def before(_: nn.Module, inputs: Any) -> None:
            starts.append(time.perf_counter())
            spent["images"] += len(inputs[0])

        model.register_forward_pre_hook(before)
        model.register_forward_hook(
            lambda *_: spent.__setitem__("forward", spent["forward"] + time.perf_counter() - starts.pop())
        )
        return model

    validation.gathered_model = observed
    loop.validate = timed("whole", loop.validate)
    if ranks.first:
        score = evaluate_model.score_detections

        def scored(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            result = score(*arguments, **named)
            spent["scores"] += time.perf_counter() - start
            return result

        evaluate_model.score_detections = scored
    tracker = MemoryTracker() if ranks.first else None
    loop.run(config, RunInfo("run", folder, "commit"), ranks, tracker)
    if tracker:
        spent["scored"] = next(value for name, value, _ in tracker.points if name == "evaluation/images")
        spent["AP"] = next((value for name, value, _ in tracker.points if name == "val/AP"), -1.0)
    return spent


def _row(images: int, scorer: str, ranks: list[dict[str, float]]) -> Row:
    title = f"evaluation of {images} images on {RANKS} ranks"
    first = ranks[0]
    read = sum(rank["images"] for rank in ranks)
    share = 1 - first["forward"] / first["whole"]
    once = "every image once" if read == first["scored"] == images else f"IMAGES DIFFER: {read:.0f} of {images}"
    print(
        f"{title:45} {scorer:12} {first['whole']:7.2f} s, forward passes {first['forward']:7.2f} s, scores {first['scores']:6.2f} s; "
        f"{share:.0%} is not the forward pass; {once}, AP {first['AP']:.6f}",
        flush=True,
    )
    return {
        "case": title,
        "side": scorer,
        "whole_s": first["whole"],
        "forward_s": first["forward"],
        "scores_s": first["scores"],
        "other_share": share,
        "images": read,
    }
