"""The whole loop of a worker on a small data set: device against host, again, resumed, and with each option."""

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from detr.config import DeformableConfig, TransformConfig
from detr.model import build_model
from pipeline.checkpoint import catalog
from pipeline.checkpoint import state as checkpoint_state
from pipeline.config import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    EvaluateConfig,
    OptimConfig,
    RunConfig,
    TrackConfig,
)
from pipeline.distributed.ranks import Ranks
from pipeline.training.graphs.planned import HIT_RATE
from pipeline.training.loop import run as train
from pipeline.training.model import save_initial
from pipeline.training.state import RunInfo
from shards.config import WriteConfig
from shards.synthetic import write_synthetic
from shards.write.writer import write_coco
from tests.gpu.results import Results
from tests.gpu.work import Setting, relative
from tests.support.tiny_model import TINY_MODEL
from tests.support.tracker import MemoryTracker

_CLASSES = 4
_REHEARSED = ("masks, bf16", "deformable", "conditional")


def run(results: Results, setting: Setting) -> None:
    with tempfile.TemporaryDirectory() as name:
        os.environ |= {"DETR_CACHE": f"{name}/cache", "DETR_SCRATCH": f"{name}/scratch"}
        root = Path(name)
        write_tiny(root, 12 if setting.tiny else 40)
        base = tiny_run(root)
        results.attempt("device and host", lambda: _repeat(results, setting, root, base))
        options = _options(base)
        for title in _REHEARSED if setting.tiny else options:
            config = options[title]
            short = replace(config, optim=replace(config.optim, epochs=1))
            results.attempt(title, lambda title=title, short=short: _put(results, title, root, short, setting.device))


def write_tiny(root: Path, images: int) -> None:
    """Write training and validation data of the built-in kind, 64 pixels wide."""
    made = write_synthetic(root / "coco", train=images, val=9, size=64)
    for name, split in (("train", made.train), ("val", made.val)):
        write_coco(split.images, split.annotations, root / name, WriteConfig(samples_per_shard=5))


def tiny_run(root: Path) -> RunConfig:
    """Return a run of a tiny model on these data."""
    return RunConfig(
        recipe="tiny",
        storage=str(root / "runs"),
        model=replace(TINY_MODEL, dropout=0.0),
        transform=TransformConfig(train_scales=(48, 64), max_size=64, eval_size=64, crop=False),
        data=DataConfig(train=str(root / "train"), val=str(root / "val"), reader_threads=2),
        optim=OptimConfig(batch_size=4, epochs=2, lr=1e-3, lr_backbone=1e-4, decay_epoch=1, ema=0.9),
        evaluate=EvaluateConfig(batch_size=2, pictures=1),
        checkpoint=CheckpointConfig(every_steps=3, keep=9),
        track=TrackConfig(log_every=1),
    )


def _options(base: RunConfig) -> dict[str, RunConfig]:
    def compute(**changes: object) -> RunConfig:
        return replace(base, compute=replace(ComputeConfig(), **changes))  # type: ignore[arg-type]

    masks = replace(TINY_MODEL, masks=True, hidden_dim=128, heads=8)
    return {
        "bf16": compute(precision="bf16"),
        "micro-batches of 1": compute(max_microbatch=1),
        "recompute both": compute(recompute="both"),
        "canvas of 32": compute(canvas_multiple=32),
        "graphs": compute(canvas_multiple=32, graphs=True),
        "losses per rank": replace(base, optim=replace(base.optim, normalise="per_rank")),
        "masks": replace(base, model=masks),
        "masks, bf16": replace(compute(precision="bf16"), model=masks),
        "learned positions": replace(base, model=replace(TINY_MODEL, position="learned")),
        "deformable": replace(
            base, model=replace(TINY_MODEL, variant="deformable", hidden_dim=32, deformable=DeformableConfig(levels=3))
        ),
        "conditional": replace(base, model=replace(TINY_MODEL, variant="conditional", hidden_dim=32)),
    }


def _repeat(results: Results, setting: Setting, root: Path, base: RunConfig) -> None:
    host, _ = _trained(root / "host", base, "cpu")
    device, _ = _trained(root / "device", base, setting.device)
    again, _ = _trained(root / "again", base, setting.device)
    results.put("device against host", weights=relative(device, host), same_bits=bool(torch.equal(device, host)))
    results.put("device again", weights=relative(again, device), same_bits=bool(torch.equal(again, device)))
    resumed = root / "resumed"
    shutil.copytree(root / "device", resumed)
    for path in catalog.list_checkpoints(resumed)[2:]:
        shutil.rmtree(path)  # type: ignore[arg-type]
    weights, _ = _trained(resumed, base, setting.device)
    results.put("device resumed", weights=relative(weights, device), same_bits=bool(torch.equal(weights, device)))


def _put(results: Results, title: str, root: Path, config: RunConfig, device: str) -> None:
    _, tracker = _trained(root / title.replace(" ", "-"), config, device)
    losses = [value for name, value, _ in tracker.points if name == "train/loss"]
    scores = [value for name, value, _ in tracker.points if name == "val/AP"]
    rates = [value for name, value, _ in tracker.points if name == HIT_RATE]
    hits = {"last_hit_rate": rates[-1]} if rates else {}
    results.put(title, first_loss=losses[0], last_loss=losses[-1], evaluations=len(scores), **hits)


def _trained(folder: Path, config: RunConfig, device: str) -> tuple[Tensor, MemoryTracker]:
    """Train the run in the folder, from its newest checkpoint, and return all weights in a row."""
    if not folder.exists():
        folder.mkdir()
        torch.manual_seed(config.seed)
        save_initial(build_model(config.model, _CLASSES), folder)
    tracker = MemoryTracker()
    train(config, RunInfo("run", folder, "commit"), Ranks(device=torch.device(device)), tracker)
    model = build_model(config.model, _CLASSES)
    path = catalog.newest(folder)
    assert path is not None
    checkpoint_state.load_weights(path, model)
    return torch.cat([value.flatten().double() for value in model.state_dict().values()]), tracker
