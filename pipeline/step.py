"""One optimizer step over the global batch.

The gradient is that of the global batch whatever the number of workers. DDP averages gradients over ranks, so each
rank's loss is divided by (global sum / world size) for both normalisers:

- boxes: the number of target boxes over all ranks, as in the original, at least 1 over the whole batch (the original
  clamps the per-rank mean instead; they differ only where a global batch holds fewer boxes than ranks).
- cross entropy: the sum of the class weights over all queries of all ranks. Departure from the original, which divides
  by each rank's own sum, so that its result depends on the number of GPUs. On one worker the two are the same.

Both are known from the targets alone, so one small reduction before the forward is all that is added.

A rank's images may be cut into micro-batches, one forward and backward pass each (`compute.max_microbatch`), when they
do not fit its memory at once: the same sums, and so the same gradient up to what padding changes.

`optim.normalise: per_rank` restores the original: each rank's cross entropy is divided by its own sum of weights, the
boxes by max(boxes over all ranks / ranks, 1), and the gradients are averaged. A micro-batch then counts as what one of
the original's GPUs holds: the result is the original's on as many GPUs as there are micro-batches on all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from detr.batch import Batch, normalise
from detr.criterion import Losses, ce_weight_sum, compute_losses
from detr.execution import autocast
from detr.matcher import NonFiniteError
from detr.model import Outputs
from pipeline.breakdown import Lap, no_lap
from pipeline.config import RunConfig
from pipeline.errors import TrainingError
from pipeline.parallel import Ranks, averaging, clip_gradients
from pipeline.stopping import NOTHING, Asked

RANDOMNESS = "1: dropout from torch.manual_seed((seed * 1000003 + step) * 4099 + rank + (micro-batch << 48))"
"""The rule that `train_step` seeds by, for checkpoints to name: change the number with it."""


_REMEDY = "lower --optim.lr or look at these images"


class StepResult(NamedTuple):
    """A step's figures, on the device: losses of this rank (its share of the global loss), total gradient norm.

    asked: what any rank asks for after this step; the same on every rank.
    """

    losses: Losses
    grad_norm: Tensor
    asked: Asked = NOTHING


class Diverged(TrainingError):
    """A step that must not be taken. `record` is what to keep of it: gradient norm, and losses and images by rank.

    asked: what any rank asks for after this step all the same.
    """

    def __init__(self, message: str, step: int, record: dict[str, Any], asked: Asked = NOTHING) -> None:
        super().__init__(message)
        self.step, self.record, self.asked = step, record, asked

    @property
    def reason(self) -> str:
        """The message without the step and without what to do."""
        return str(self).removeprefix(f"step {self.step}: ").partition(f"; {_REMEDY}")[0]

    def __reduce__(self) -> tuple[type[Diverged], tuple[str, int, dict[str, Any], Asked]]:
        return type(self), (str(self), self.step, self.record, self.asked)  # Ray sends it to the driver


class _Pass(NamedTuple):
    """What a forward and backward pass over one micro-batch leaves; `layers`: logits and boxes, without gradients."""

    batch: Batch
    losses: Losses
    layers: list[tuple[Tensor, Tensor]]
    error: str = ""


class Dividers(NamedTuple):
    """What the sums of a pass are divided by: those over matched boxes (and masks), and the cross entropy."""

    boxes: Tensor | float
    cross_entropy: Tensor | float


def normalisers(
    batches: Sequence[Batch], config: RunConfig, ranks: Ranks, asks: Asked = NOTHING
) -> tuple[list[Dividers], Tensor]:
    """What each micro-batch's losses are divided by, see the module's text, and how many ranks ask for each thing.

    A collective call.
    Scalars on the rank's device: the host waits neither for the copy nor for the sum.
    """
    per_batch = [batch.targets for batch in batches]
    boxes = sum(len(target.labels) for targets in per_batch for target in targets)
    weights = [ce_weight_sum(targets, config.model.num_queries, config.loss) for targets in per_batch]
    mine = torch.tensor([float(boxes), sum(weights), *map(float, asks)], dtype=torch.float64)
    sums = ranks.sum(mine.to(ranks.device, non_blocking=True))
    total_boxes, total_weight, asking = sums[0], sums[1], sums[2:]
    if config.optim.normalise == "per_rank":
        passes = len(batches)
        # The passes' gradients add up, so each is divided by their number as well: a mean, like DDP's over ranks.
        mean_boxes = (total_boxes / (ranks.world_size * passes)).clamp(min=1).float() * passes
        # Without images both sum and weight are 0, where the original has no answer.
        return [Dividers(mean_boxes, (weight or 1.0) * passes) for weight in weights], asking
    # With eos_coef 0 and no box the weights' sum is 0, and so is the loss that it divides.
    total_weight = torch.where(total_weight > 0, total_weight, 1.0)
    mean = (total_boxes.clamp(min=1) / ranks.world_size).float(), (total_weight / ranks.world_size).float()
    return [Dividers(*mean)] * len(batches), asking


def train_step(
    model: nn.Module,
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    config: RunConfig,
    ranks: Ranks,
    step: int,
    asks: Asked = NOTHING,
    lap: Lap = no_lap,
) -> StepResult:
    """Forward, losses and backward of each micro-batch, then clip and update. Learning rates are the caller's.

    batches: this rank's part of the step; as many on every rank, some perhaps without images.
    asks: what this rank wants after the step.
    lap: told of each part of the step as it ends.

    Raises `Diverged` before the update when anything is not finite on any rank, or the gradient's norm is past
    `guard.max_grad_norm`, naming step, image ids and part.
    The total norm is the same on every rank, since gradients have been averaged by then, so all ranks stop together.
    """
    dividers, asking = normalisers(batches, config, ranks, asks)
    # Before the forward pass, so that the last gradients make room for the activations.
    optimizer.zero_grad(set_to_none=True)
    passes = []
    lap("other")
    for number, (batch, divider) in enumerate(zip(batches, dividers, strict=True)):
        # Dropout depends on the step and not on what came before it, so that a resumed run repeats it bit for bit.
        torch.manual_seed((config.seed * 1_000_003 + step) * 4099 + ranks.rank + (number << 48))
        with averaging(model, now=number == len(batches) - 1):
            passes.append(_pass(model, batch.to(ranks.device), divider, config, lap))
    grad_norm = clip_gradients(optimizer, config.optim.clip_norm)
    norm, *counts = torch.cat([grad_norm.double()[None], asking]).tolist()  # one wait for the device, for both
    asked = Asked(*(count > 0 for count in counts))
    if not norm < (config.guard.max_grad_norm or math.inf):  # false for NaN
        raise _diverged(passes, norm, config.guard.max_grad_norm, ranks, step, asked)
    optimizer.step()
    lap("optimizer")
    return StepResult(
        _sum([(len(one.batch), one.losses) for one in passes]),
        grad_norm.detach(),
        asked,
    )


def _pass(model: nn.Module, batch: Batch, dividers: Dividers, config: RunConfig, lap: Lap) -> _Pass:
    images = normalise(batch, config.transform)
    with autocast(images.device, config.compute.precision):
        outputs = model(images, batch.padding)
    layers = [(layer.logits.detach(), layer.boxes.detach()) for layer in (outputs, *outputs.auxiliary)]
    lap("forward")
    canvas = (batch.images.shape[2], batch.images.shape[3])
    error = ""
    try:
        losses = compute_losses(outputs, batch.targets, dividers.boxes, config.loss, dividers.cross_entropy, canvas)
    except NonFiniteError as found:
        # The other ranks are on their way to the gradients' sum: come along, with gradients that stop them all there.
        error, losses = str(found), _not_finite(outputs)
    lap("loss")
    losses.total.backward()  # type: ignore[no-untyped-call]
    lap("backward")
    return _Pass(batch, losses, layers, error)


def _not_finite(outputs: Outputs) -> Losses:
    """Losses of which every gradient is NaN."""
    parts = [part for layer in (outputs, *outputs.auxiliary) for part in layer if isinstance(part, Tensor)]
    return Losses(torch.stack([part.float().sum() for part in parts]).sum() * torch.nan, {})


def _sum(found: Sequence[tuple[int, Losses]]) -> Losses:
    """The losses of micro-batches of so many images together: losses add up, errors are means over images."""
    if len(found) == 1:
        return found[0][1]
    images = max(sum(count for count, _ in found), 1)
    parts = {
        name: sum(
            (losses.parts[name] * (1 if name.startswith("loss_") else count / images) for count, losses in found),
            torch.zeros_like(value),
        )
        for name, value in found[0][1].parts.items()
    }
    return Losses(torch.stack([losses.total.detach() for _, losses in found]).sum(), parts)


def _diverged(
    passes: Sequence[_Pass], grad_norm: float, bound: float, ranks: Ranks, step: int, asked: Asked
) -> Diverged:
    """The same error on every rank; a collective call."""
    mine = {
        "images": [target.image_id for one in passes for target in one.batch.targets],
        "losses": [{name: str(float(value)) for name, value in one.losses.parts.items()} for one in passes],
        "words": [word for one in passes for word in _words(one)],
    }
    found = ranks.gather(mine)
    record = {"grad_norm": str(grad_norm), "ranks": found}
    said = "; ".join(f"rank {rank}: {word}" for rank, one in enumerate(found) for word in one["words"])
    ids = [image_id for one in found for image_id in one["images"]]
    if said:
        said = f"not finite before the update: {said}"
    elif math.isfinite(grad_norm):
        said = f"the gradient's norm is past guard.max_grad_norm ({grad_norm:.4g} > {bound:g}); images {ids}"
    else:
        said = f"the gradient is not finite though every loss is; images {ids}"
    return Diverged(f"step {step}: {said}; {_REMEDY}", step, record, asked)


def _words(one: _Pass) -> list[str]:
    """What is not finite in a pass: in the matcher's words, or as parts of the loss and images."""
    if one.error:
        return [one.error]
    parts = [name for name, value in one.losses.parts.items() if not torch.isfinite(value)]
    if not parts:
        return []
    # The matcher looks only at images with objects, so predictions for the others can be at fault.
    fine = [
        torch.stack([part[row].isfinite().all() for layer in one.layers for part in layer]).all()
        for row in range(len(one.batch))
    ]
    ids = [target.image_id for target in one.batch.targets]
    guilty = [image_id for image_id, finite in zip(ids, fine, strict=True) if not finite]
    return [f"{', '.join(parts)} on images {guilty or ids}"]
