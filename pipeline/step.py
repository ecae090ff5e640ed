"""One optimizer step over the global batch.

The gradient is that of the global batch whatever the number of workers. DDP averages gradients over ranks, so each
rank's loss is divided by (global sum / world size) for both normalisers:

- boxes: the number of target boxes over all ranks, as in the original, at least 1 over the whole batch (the original
  clamps the per-rank mean instead; they differ only where a global batch holds fewer boxes than ranks).
- cross entropy: the sum of the class weights over all queries of all ranks. Departure from the original, which divides
  by each rank's own sum, so that its result depends on the number of GPUs. On one worker the two are the same.

Both are known from the targets alone, so one small reduction before the forward is all that is added.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from detr.batch import Batch, normalise
from detr.criterion import Losses, ce_weight_sum, compute_losses
from detr.execution import autocast
from detr.matcher import NonFiniteError
from detr.model import Outputs
from pipeline.config import RunConfig
from pipeline.errors import TrainingError
from pipeline.parallel import Ranks


class StepResult(NamedTuple):
    """A step's figures, on the device: losses of this rank (its share of the global loss), total gradient norm."""

    losses: Losses
    grad_norm: Tensor


def normalisers(batch: Batch, config: RunConfig, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """(boxes, cross-entropy weight) that this rank's losses are divided by; see the module's text. Collective.

    Scalars on the rank's device: the host waits neither for the copy nor for the sum.
    """
    boxes = sum(len(target.labels) for target in batch.targets)
    weight = ce_weight_sum(batch.targets, config.model.num_queries, config.loss)
    sums = ranks.sum(torch.tensor([float(boxes), weight], dtype=torch.float64).to(ranks.device, non_blocking=True))
    total_boxes, total_weight = sums.unbind()
    # With eos_coef 0 and no box the weights' sum is 0, and so is the loss that it divides.
    total_weight = torch.where(total_weight > 0, total_weight, 1.0)
    return (total_boxes.clamp(min=1) / ranks.world_size).float(), (total_weight / ranks.world_size).float()


def train_step(
    model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, config: RunConfig, ranks: Ranks, step: int
) -> StepResult:
    """Forward, losses, backward, clip, update. Learning rates are the caller's.

    Raises `TrainingError` before the update when anything is not finite, naming step, image ids and part. The total
    norm is the same on every rank, since gradients have been averaged by then, so all ranks stop together.
    """
    num_boxes, ce_normalizer = normalisers(batch, config, ranks)
    # Dropout depends on the step and not on what came before it, so that a resumed run repeats it bit for bit.
    torch.manual_seed((config.seed * 1_000_003 + step) * 4099 + ranks.rank)
    batch = batch.to(ranks.device)
    # Before the forward pass, so that the last gradients make room for the activations.
    optimizer.zero_grad(set_to_none=True)
    images = normalise(batch, config.transform)
    with autocast(ranks.device, config.compute.precision):
        outputs = model(images, batch.padding)
    try:
        canvas = (batch.images.shape[2], batch.images.shape[3])
        losses = compute_losses(outputs, batch.targets, num_boxes, config.loss, ce_normalizer, canvas)
    except NonFiniteError as error:
        raise TrainingError(
            f"step {step}, rank {ranks.rank}: {error}; lower --optim.lr or look at these images"
        ) from None
    losses.total.backward()  # type: ignore[no-untyped-call]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    grad_norm = nn.utils.clip_grad_norm_(parameters, config.optim.clip_norm)
    if not torch.isfinite(grad_norm):
        raise TrainingError(_describe_non_finite(losses, outputs, batch, ranks, step))
    optimizer.step()
    return StepResult(losses, grad_norm.detach())


def _describe_non_finite(losses: Losses, outputs: Outputs, batch: Batch, ranks: Ranks, step: int) -> str:
    parts = [name for name, value in losses.parts.items() if not torch.isfinite(value)]
    # The matcher looks only at images with objects, so predictions for the others can be at fault.
    finite = [
        torch.stack([part[row].isfinite().all() for layer in (outputs, *outputs.auxiliary) for part in layer[:2]]).all()
        for row in range(len(batch))
    ]
    guilty_ids = [target.image_id for target, fine in zip(batch.targets, finite, strict=True) if not fine]
    ids = guilty_ids or [target.image_id for target in batch.targets]
    found = ranks.gather((parts, ids))
    guilty = {rank: said for rank, said in enumerate(found) if said[0]}
    if not guilty:
        return f"step {step}: the gradient is not finite though every loss is; images {[i for _, ids in found for i in ids]}"
    said = "; ".join(f"rank {rank}: {', '.join(parts)} on images {ids}" for rank, (parts, ids) in guilty.items())
    return f"step {step}: not finite before the update: {said}; lower --optim.lr or look at these images"
