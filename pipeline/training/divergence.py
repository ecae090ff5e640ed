"""Description of a step whose loss or gradient is not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detr.batch import Batch
from detr.criterion import Losses
from pipeline.distributed.ranks import Ranks
from pipeline.errors import TrainingError
from pipeline.training.requests import NO_REQUEST, Request

_REMEDY = "lower --optim.lr or look at these images"


class Diverged(TrainingError):
    """Raised before the update of a step whose loss or gradient is not finite or too large.

    `record` holds the gradient norm and, per rank, losses and image ids. `request` holds the requests of any rank
    after this step.
    """

    def __init__(self, message: str, step: int, record: dict[str, Any], request: Request = NO_REQUEST) -> None:
        super().__init__(message)
        self.step, self.record, self.request = step, record, request

    @property
    def reason(self) -> str:
        """Message without the step and the remedy."""
        return str(self).removeprefix(f"step {self.step}: ").partition(f"; {_REMEDY}")[0]

    def __reduce__(self) -> tuple[type[Diverged], tuple[str, int, dict[str, Any], Request]]:
        return type(self), (str(self), self.step, self.record, self.request)  # Ray sends it to the driver


class ForwardPass(NamedTuple):
    """Result of the forward and backward pass over one micro-batch."""

    batch: Batch
    losses: Losses
    layers: list[tuple[Tensor, Tensor]]
    """Logits and boxes of each decoder layer, detached."""
    error: str = ""
    """Message of the matcher if its costs were not finite."""


def divergence(
    passes: Sequence[ForwardPass], grad_norm: float, bound: float, ranks: Ranks, step: int, request: Request
) -> Diverged:
    """Return the same error on every rank; a collective call."""
    own = {
        "images": [target.image_id for result in passes for target in result.batch.targets],
        "losses": [{name: str(float(value)) for name, value in result.losses.parts.items()} for result in passes],
        "messages": [text for result in passes for text in _messages(result)],
    }
    by_rank = ranks.all_gather(own)
    record = {"grad_norm": str(grad_norm), "ranks": by_rank}
    not_finite = "; ".join(f"rank {rank}: {text}" for rank, found in enumerate(by_rank) for text in found["messages"])
    ids = [image_id for found in by_rank for image_id in found["images"]]
    if not_finite:
        reason = f"not finite before the update: {not_finite}"
    elif math.isfinite(grad_norm):
        reason = f"the gradient's norm is past guard.max_grad_norm ({grad_norm:.4g} > {bound:g}); images {ids}"
    else:
        reason = f"the gradient is not finite though every loss is; images {ids}"
    return Diverged(f"step {step}: {reason}; {_REMEDY}", step, record, request)


def _messages(result: ForwardPass) -> list[str]:
    """Describe the values of a pass that are not finite: the matcher's message, or the losses and their images."""
    if result.error:
        return [result.error]
    names = [name for name, value in result.losses.parts.items() if not torch.isfinite(value)]
    if not names:
        return []
    # The matcher checks only images with objects, so predictions for the others can be the cause.
    finite = [
        torch.stack([values[row].isfinite().all() for layer in result.layers for values in layer]).all()
        for row in range(len(result.batch))
    ]
    ids = [target.image_id for target in result.batch.targets]
    bad = [image_id for image_id, is_finite in zip(ids, finite, strict=True) if not is_finite]
    return [f"{', '.join(names)} on images {bad or ids}"]
