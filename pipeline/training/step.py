"""One optimizer step over the global batch.

The gradient is that of the global batch for any number of workers. DDP averages gradients over ranks, so each rank's
loss is divided by (global sum / world size) for both normalisers:

- boxes: the number of target boxes over all ranks, as in the original, at least 1 over the whole batch (the original
  clamps the per-rank mean instead; they differ only where a global batch holds fewer boxes than ranks).
- cross entropy: the sum of the class weights over all queries of all ranks. This departs from the original, which
  divides by each rank's own sum, so that its result depends on the number of GPUs. On one worker the two are the same.

Both are known from the targets alone, so they cost one small reduction before the forward pass.

A rank's images may be split into micro-batches with one forward and backward pass each (`compute.max_microbatch`), if
they do not fit its memory: the sums are the same, and so is the gradient, except for the effect of padding.

`optim.normalise: per_rank` restores the original: each rank's cross entropy is divided by its own sum of weights, the
boxes by max(boxes over all ranks / ranks, 1), and the gradients are averaged. A micro-batch then counts as one of the
original's GPUs: the result is the original's on as many GPUs as there are micro-batches on all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from detr.batch import Batch
from detr.criterion import Losses, ce_weight_sum, compute_losses
from detr.matcher import NonFiniteError
from detr.variant import Outputs, SigmoidOutputs, tensors_of
from pipeline.config import RunConfig
from pipeline.distributed.parallel import clip_gradients, gradient_sync
from pipeline.distributed.ranks import Ranks
from pipeline.tracking.step_timer import Lap, no_lap
from pipeline.training.divergence import ForwardPass, divergence
from pipeline.training.graphs.passes import Graphs
from pipeline.training.model import predict
from pipeline.training.requests import NO_REQUEST, Request

RANDOMNESS = "1: dropout from torch.manual_seed((seed * 1000003 + step) * 4099 + rank + (micro-batch << 48))"
"""Version and rule of the seeds in `train_step`, stored in checkpoints: change the number with the rule."""


_LEAST_WEIGHT = 1e-6  # far below the mean of any images


class StepResult(NamedTuple):
    """Results of a step, on the device."""

    losses: Losses
    """Share of this rank in the global loss."""
    grad_norm: Tensor
    """Total norm of the gradient before clipping."""
    request: Request = NO_REQUEST
    """Requests of any rank after this step; the same on every rank."""


class Dividers(NamedTuple):
    """Divisors of the loss sums of one pass: for matched boxes and masks, for the cross entropy, for copied boxes."""

    boxes: Tensor | float
    cross_entropy: Tensor | float
    copies: Tensor | float
    """For hybrid matching, in which each box is there several times."""


def normalisers(
    batches: Sequence[Batch], config: RunConfig, ranks: Ranks, request: Request = NO_REQUEST
) -> tuple[list[Dividers], Tensor]:
    """Return the divisors of each micro-batch's losses, and the number of ranks that make each request.

    A collective call; the module's docstring explains the divisors. All are scalars on the rank's device, and the host
    does not wait for the copy or the sum.
    """
    per_batch = [batch.targets for batch in batches]
    boxes = sum(len(target.labels) for targets in per_batch for target in targets)
    weights = [ce_weight_sum(targets, config.model.num_queries, config.loss) for targets in per_batch]
    mine = torch.tensor([float(boxes), sum(weights), *map(float, request)], dtype=torch.float64)
    sums = ranks.sum(mine.to(ranks.device, non_blocking=True))
    asking = sums[2:]
    copies = config.loss.one_to_many_copies if config.model.deformable.one_to_many_queries else 1
    if config.optim.normalise == "per_rank":
        passes = len(batches)
        # Gradients of passes add up, so each is also divided by the number of passes: a mean, like DDP's over ranks.
        mean_boxes, mean_copies = (
            (sums[0] * each / (ranks.world_size * passes)).clamp(min=1).float() * passes for each in (1, copies)
        )
        # Without images both sum and weight are 0; the original would divide 0 by 0.
        return [Dividers(mean_boxes, (weight or 1.0) * passes, mean_copies) for weight in weights], asking
    means = (sums[:2] / ranks.world_size).float()
    least = 1 / ranks.world_size  # of one box in the global batch
    mean_boxes = means[0].clamp(min=least)
    mean_copies = mean_boxes if copies == 1 else (means[0] * copies).clamp(min=least)
    # With eos_coef 0 and no box the sum of the weights is 0, and so is the loss: divide it by anything else.
    mean_weight = means[1].clamp(min=_LEAST_WEIGHT)
    return [Dividers(mean_boxes, mean_weight, mean_copies)] * len(batches), asking


def train_step(
    model: nn.Module,
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    config: RunConfig,
    ranks: Ranks,
    step: int,
    request: Request = NO_REQUEST,
    lap: Lap = no_lap,
    graphs: Graphs | None = None,
) -> StepResult:
    """Run forward, losses and backward of each micro-batch, then clip the gradient and update the weights.

    `batches` are this rank's micro-batches: equally many on every rank, some perhaps without images. `request` holds
    this rank's requests after the step. `lap` is called at the end of each phase of the step. `graphs` run the passes of a
    model that is not wrapped. The caller sets learning rates.

    Raise `Diverged` before the update, naming step, images and losses, if anything is not finite on any rank or the
    norm of the gradient exceeds `guard.max_grad_norm`. Gradients are averaged by then, so the norm is the same on every
    rank, and all ranks raise together.
    """
    dividers, asking = normalisers(batches, config, ranks, request)
    # Before the forward pass, to free the memory of the last gradients for the activations.
    optimizer.zero_grad(set_to_none=True)
    if graphs:
        graphs.begin()
    passes = []
    lap("other")
    for number, (batch, divider) in enumerate(zip(batches, dividers, strict=True)):
        # Seed by step, so that dropout does not depend on earlier steps and a resumed run repeats it bit for bit.
        seed = (config.seed * 1_000_003 + step) * 4099 + ranks.rank + (number << 48)
        if graphs:
            passes.append(_pass(graphs.forward(batch, seed), graphs.backward, batch, divider, config, lap))
            continue
        torch.manual_seed(seed)
        with gradient_sync(model, now=number == len(batches) - 1):
            passes.append(
                _pass(predict(model, batch.to(ranks.device), config), Tensor.backward, batch, divider, config, lap)
            )
    if graphs:
        graphs.finish()
    grad_norm = clip_gradients(optimizer, config.optim.clip_norm)
    norm, *counts = torch.cat([grad_norm.double()[None], asking]).tolist()  # one device sync for both
    any_request = Request(*(count > 0 for count in counts))
    if not norm < (config.guard.max_grad_norm or math.inf):  # false for NaN
        raise divergence(passes, norm, config.guard.max_grad_norm, ranks, step, any_request)
    optimizer.step()
    lap("optimizer")
    losses = _sum([(len(result.batch), result.losses) for result in passes])
    return StepResult(losses, grad_norm.detach(), any_request)


def _pass(
    outputs: Any, backward: Callable[[Tensor], object], batch: Batch, dividers: Dividers, config: RunConfig, lap: Lap
) -> ForwardPass:
    layers = [(layer.logits.detach(), layer.boxes.detach()) for layer in (outputs, *outputs.auxiliary)]
    lap("forward")
    canvas = (batch.images.shape[2], batch.images.shape[3])
    error = ""
    try:
        losses = compute_losses(
            outputs, batch.targets, dividers.boxes, config.loss, dividers.cross_entropy, canvas, dividers.copies
        )
    except NonFiniteError as found:
        # The other ranks will wait in the reduction of gradients: join it, with NaN gradients that stop all ranks
        # there.
        error, losses = str(found), _not_finite(outputs)
    lap("loss")
    backward(losses.total)
    lap("backward")
    return ForwardPass(batch, losses, layers, error)


def _not_finite(outputs: Outputs | SigmoidOutputs) -> Losses:
    """Return losses whose gradients are all NaN."""
    tensors = tensors_of(outputs)
    return Losses(torch.stack([tensor.float().sum() for tensor in tensors]).sum() * torch.nan, {})


def _sum(found: Sequence[tuple[int, Losses]]) -> Losses:
    """Add up the losses of micro-batches, given as (images, losses); error rates are averaged over the images."""
    if len(found) == 1:
        return found[0][1]
    images = max(sum(count for count, _ in found), 1)
    terms = {
        name: sum(
            (losses.parts[name] * (1 if name.startswith("loss_") else count / images) for count, losses in found),
            torch.zeros_like(value),
        )
        for name, value in found[0][1].parts.items()
    }
    return Losses(torch.stack([losses.total.detach() for _, losses in found]).sum(), terms)
