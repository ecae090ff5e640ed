"""Mask losses of section 4.4: focal loss (Lin et al., 2017) and DICE loss of the last layer's matched queries.

Masks are compared on the canvas of the batch, padding included, as in the original.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from detr.batch import Target
from detr.config import ConfigError
from detr.geometry import Size
from detr.matcher import Assignment

_ALPHA = 0.25  # weight of a pixel inside the object; outside 1 - alpha


def mask_losses(
    masks: Tensor, targets: Sequence[Target], found: Assignment, layers: int, canvas: Size | None
) -> dict[str, Tensor]:
    """Return `loss_mask` and `loss_dice`, each a sum over matched pairs in fp32.

    masks: logits [B, Q, h, w] of the last decoder layer. found: pairs of `layers` layers, the last layer's first.
    canvas: (height, width) in pixels of the padded images; None takes the largest height and width of the target masks,
    which is the same unless the canvas was made larger than its images.
    Raise `ConfigError` if a target has no masks.
    """
    true, offsets = _pack(targets, canvas, masks.device)
    matched = len(found.image) // layers
    image, query, target = found.image[:matched], found.query[:matched], found.target[:matched]
    predicted = F.interpolate(masks[image, query].float()[:, None], true.shape[1:], mode="bilinear")[:, 0].flatten(1)
    inside = true[offsets[image] + target].flatten(1)
    return {"loss_mask": _focal(predicted, inside), "loss_dice": _dice(predicted, inside)}


def _pack(targets: Sequence[Target], canvas: Size | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return all target masks on one canvas, bool [N, H, W], and the row of each image's first mask, int64 [B]."""
    masks = []
    for target in targets:
        if target.masks is None:
            raise ConfigError(
                f"image {target.image_id}: got no masks, expected {len(target.labels)} for the model's mask head; "
                "read masks with the images, or train without them (masks=False)"
            )
        masks.append(target.masks)
    if canvas is None:
        canvas = (max((mask.shape[1] for mask in masks), default=1), max((mask.shape[2] for mask in masks), default=1))
    counts = [len(mask) for mask in masks]
    packed = torch.zeros(sum(counts), *canvas, dtype=torch.bool, device=device)
    starts = [0, *accumulate(counts)][:-1]
    for mask, start in zip(masks, starts, strict=True):
        # Image by image and padded on the device: unpadded masks are copied once, asynchronously from pinned memory.
        count, height, width = mask.shape
        packed[start : start + count, :height, :width] = mask.to(device, non_blocking=True)
    return packed, torch.tensor(starts, dtype=torch.int64).to(device, non_blocking=True)


def _focal(logits: Tensor, inside: Tensor) -> Tensor:
    """Return the sum over masks [N, P] of the mean over pixels of -alpha (1 - p)^2 log p; p: probability of the truth."""
    towards = torch.where(inside, logits, -logits)
    alpha = torch.where(inside, _ALPHA, 1 - _ALPHA)
    return (alpha * (-towards).sigmoid().square() * -F.logsigmoid(towards)).mean(1).sum()


def _dice(logits: Tensor, inside: Tensor) -> Tensor:
    """Return the sum over masks [N, P] of 1 - (2 |both| + 1) / (|predicted| + |true| + 1)."""
    probability = logits.sigmoid()
    both = torch.where(inside, probability, 0).sum(1)
    return (1 - (2 * both + 1) / (probability.sum(1) + inside.sum(1) + 1)).sum()
