"""What a checkpoint says of itself: `meta.json`.

Weights and optimizer lie beside it. Everything else that a run goes on from is a function of what stands here: plan and
augmentation of (seed, position), the learning rate of the step, dropout of (seed, step, rank) by the rule that is named.
The rest says where the checkpoint came from, so that it explains itself without the run's folder or its tracking server.
"""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING, Any

import msgspec

from pipeline.boundaries import is_evaluated, is_milestone
from pipeline.config import RunConfig, from_json, to_json
from pipeline.step import RANDOMNESS
from shards.plan import PLAN_VERSION

if TYPE_CHECKING:
    from pipeline.state import Worker

FORMAT = 2
_LIBRARIES = ("torch", "torchvision", "numpy", "ray", "webdataset", "mlflow", "detr-cluster")


class Best(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The highest AP that a run had when a checkpoint was written (of masks where it predicts them), and its step."""

    step: int
    ap: float


class Meta(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a checkpoint is of: enough to refuse the wrong data and to say where it came from."""

    step: int
    epoch: float
    samples: int
    """Position in the stream of samples."""
    run_id: str
    """Of MLflow."""
    seed: int
    batch_size: int
    train_digest: str
    num_classes: int
    code_commit: str
    world_size: int
    versions: dict[str, str]
    format: int = FORMAT
    # Options of the plan, and where its cut into steps begins: absent, and as here, before there were any.
    sort_window: int = 1
    shuffle_shards: int = 0
    epoch_tail: str = "straddle"
    origin_step: int = 0
    origin_samples: int = 0
    plan_version: int = 1
    # From format 2 on; absent before.
    val_digest: str = ""
    total_steps: int = 0
    """Where the schedule ends."""
    lr_factor: float = 1.0
    """What the learning rates are multiplied with at the next step."""
    randomness: str = ""
    """How the random numbers of a step follow from what stands here."""
    best: Best | None = None
    milestone: bool = False
    """Kept for good; see `CheckpointConfig`."""
    evaluate: bool = False
    """To be evaluated beside the training, and kept until it is (`pipeline/asynchronous.py`)."""
    ema: bool = False
    """Whether averages of the weights (`pipeline/ema.py`) lie beside them."""
    config: dict[str, Any] = {}
    """The whole `RunConfig`; see `configuration`."""
    part: str = ""
    """Which folder beside this file holds the state, in a store by URL (`pipeline/checkpoint_store.py`); empty: its own."""

    def configuration(self) -> RunConfig | None:
        """The run's configuration, None before format 2. Raises `RunConfigError` where it is not one of this version's."""
        return from_json(msgspec.json.encode(self.config)) if self.config else None


def meta_of(worker: Worker, step: int) -> Meta:
    """What the checkpoint of `step` says, but for `best` and `part`, which are known when it is written."""
    config, schedule = worker.config, worker.schedule
    return Meta(
        step=step,
        epoch=schedule.epoch(step),
        samples=schedule.samples(step),
        run_id=worker.place.run_id,
        seed=config.seed,
        batch_size=config.optim.batch_size,
        train_digest=worker.train.digest,
        num_classes=worker.train.num_classes,
        code_commit=worker.place.code_commit,
        world_size=worker.ranks.world_size,
        versions=_versions(),
        sort_window=config.data.sort_window,
        shuffle_shards=config.data.shuffle_shards,
        epoch_tail=config.data.epoch_tail,
        origin_step=schedule.origin.step,
        origin_samples=schedule.origin.samples,
        plan_version=PLAN_VERSION,
        val_digest=worker.val.digest,
        total_steps=schedule.total_steps,
        lr_factor=schedule.factor(step),
        randomness=RANDOMNESS,
        milestone=is_milestone(config, schedule, step),
        evaluate=config.evaluate.asynchronous and is_evaluated(config, schedule, step),
        ema=config.optim.ema > 0,
        config=msgspec.json.decode(to_json(config)),
    )


def _versions() -> dict[str, str]:
    """Of the libraries that are installed: `detr` and the loop also run where Ray and MLflow are not."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
