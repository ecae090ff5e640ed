"""Set loss of section 3.1: cross entropy, L1 and generalised IoU of matched pairs, in every decoder layer.

All decoder layers and images are computed in one set of tensors, and the matcher's one transfer is the only time the
host waits for the device. The normalisers depend on the targets alone; the caller sums them over ranks.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detr.batch import Target
from detr.config import LossConfig
from detr.deformable.criterion import sigmoid_losses
from detr.geometry import Size
from detr.kept import constant
from detr.losses.masks import mask_losses
from detr.losses.matched import box_losses, class_error, count_error, named, zero_with_gradient
from detr.matcher import Assignment, PackedTargets, match_layers, pack
from detr.variant import Outputs, SigmoidOutputs


class Losses(NamedTuple):
    """Losses of a batch: their weighted sum, and each of them under the original's name.

    total: weighted sum, with gradients. parts: unweighted and without gradients, `loss_ce`, `loss_bbox`, `loss_giou`,
    `cardinality_error` (mean over images) and `class_error` (percent) of the last layer; the first four also with a
    suffix `_0`, `_1`, ... of the layers before it; with a mask head, `loss_mask` and `loss_dice` of the last layer; with
    two stages and hybrid matching, those of `detr.deformable.criterion`.
    """

    total: Tensor
    parts: dict[str, Tensor]


def compute_losses(
    outputs: Outputs | SigmoidOutputs,
    targets: Sequence[Target],
    num_boxes: float | Tensor,
    config: LossConfig,
    ce_normalizer: float | Tensor | None = None,
    canvas: Size | None = None,
    num_copies: float | Tensor | None = None,
) -> Losses:
    """Match queries to objects, then return all losses.

    num_boxes: divisor of the L1 and GIoU sums, above 0. The original's is max(boxes over all ranks / ranks, 1).
    ce_normalizer: divisor of the cross-entropy sums. None: `ce_weight_sum` of this call, as in the original. The focal
    loss of `SigmoidOutputs` is divided by `num_boxes` instead.
    canvas: (height, width) in pixels of the padded images, for `mask_losses`.
    num_copies: divisor for the copies of boxes in hybrid matching. None: `num_boxes` times the number of copies.
    Raise `NonFiniteError` for predictions or boxes that are not finite, `ValueError` for labels out of range, and
    `ConfigError` if the model has a mask head but an image has no masks.
    """
    if isinstance(outputs, SigmoidOutputs):
        return Losses(*sigmoid_losses(outputs, targets, num_boxes, config, num_copies))
    layers = [outputs, *(outputs.auxiliary if config.auxiliary else ())]
    logits = [layer.logits for layer in layers]
    boxes = torch.stack([layer.boxes for layer in layers]).float()
    packed = pack(targets, outputs.logits.shape[-1] - 1, outputs.logits.device)
    # Computed once for the matcher, the cross entropy and both errors.
    log_probabilities = _log_probabilities(logits)
    found = match_layers(log_probabilities, boxes.detach(), packed, config)
    if ce_normalizer is None:
        # The sum of weights is 0 only without images, and so is the sum that it divides.
        ce_normalizer = ce_weight_sum(targets, outputs.logits.shape[1], config) or 1.0

    labels = packed.labels[found.truth]
    per_layer = {
        "loss_ce": _cross_entropy(logits, log_probabilities, labels, found, config.eos_coef) / ce_normalizer,
        **{name: value / num_boxes for name, value in box_losses(boxes, packed, found).items()},
        "cardinality_error": _cardinality_error(log_probabilities, packed),
    }
    weights = {"loss_ce": config.weight_ce, "loss_bbox": config.weight_bbox, "loss_giou": config.weight_giou}
    # Losses of weight 0 are left out, since 0 times NaN is NaN.
    used = [name for name, weight in weights.items() if weight]
    weighted = []
    if used:
        factors = constant(tuple(weights[name] for name in used), boxes.device)
        weighted.append((torch.stack([per_layer[name] for name in used]) * factors[:, None]).sum())
    terms = {"class_error": class_error(log_probabilities, labels, found)}
    if outputs.masks is not None:
        weights |= {"loss_mask": config.weight_mask, "loss_dice": config.weight_dice}
        for name, value in mask_losses(outputs.masks, targets, found, len(layers), canvas).items():
            terms[name] = value.detach() / num_boxes
            if weights[name]:
                weighted.append(weights[name] * value / num_boxes)
    if not all(weights.values()):
        predictions = [*logits, boxes] if outputs.masks is None else [*logits, boxes, outputs.masks]
        weighted.append(zero_with_gradient(predictions))
    total = torch.stack(weighted).sum() if len(weighted) > 1 else weighted[0]
    return Losses(total, terms | named(per_layer))


def ce_weight_sum(targets: Sequence[Target], num_queries: int, config: LossConfig) -> float:
    """Return the normaliser of the cross entropy: the sum of class weights over the queries of these images.

    It is known before the forward pass: each image has min(objects, queries) matched queries of weight 1, and the other
    queries have weight `eos_coef`. Its mean over ranks makes the loss independent of the number of ranks.
    """
    matched = sum(min(len(target.labels), num_queries) for target in targets)
    return matched + (len(targets) * num_queries - matched) * config.eos_coef


def _log_probabilities(logits: Sequence[Tensor]) -> Tensor:
    """Return fp32 [L, B, Q, K + 1], without gradients, of each layer's logits [B, Q, K + 1]."""
    if logits[0].device.type == "cpu":  # without a copy of all logits; on a GPU the launches cost more
        result = torch.empty(len(logits), *logits[0].shape)
        for row, layer in zip(result, logits, strict=True):
            torch.log_softmax(layer.detach().float(), -1, out=row)
        return result
    return torch.stack([layer.detach() for layer in logits]).log_softmax(-1, torch.float32)


def _cross_entropy(
    logits: Sequence[Tensor], log_probabilities: Tensor, labels: Tensor, found: Assignment, eos_coef: float
) -> Tensor:
    """Return the weighted sums [L] over images and queries; the last class, no object, has weight `eos_coef`.

    labels: labels of the matched objects, in the order of `found`.
    """
    shape, device = log_probabilities.shape, log_probabilities.device
    slots = shape[:3].numel()
    classes = torch.full((slots,), shape[3] - 1, device=device).index_copy_(0, found.slot, labels)
    weights = torch.full((slots,), eos_coef, device=device).index_fill_(0, found.slot, 1.0)
    sums: Tensor = _CrossEntropy.apply(log_probabilities, classes, weights, *logits)
    return sums


class _CrossEntropy(torch.autograd.Function):
    """Weighted cross entropy per layer, from log probabilities [L, B, Q, K + 1] computed before.

    classes, weights: [L * B * Q]. The gradient is softmax minus one-hot, times the weight.

    It takes the place of `F.cross_entropy` because the criterion shall be 5 times as fast as the original: forward and
    backward of 6 layers of 8 images take 2.0 ms on one CPU thread instead of 7.3 ms, which is more than the whole
    criterion takes with it. Values and gradients are the same.
    """

    @staticmethod
    def forward(ctx: Any, log_probabilities: Tensor, classes: Tensor, weights: Tensor, *logits: Tensor) -> Tensor:
        ctx.save_for_backward(log_probabilities, classes, weights)
        ctx.dtype = logits[0].dtype
        picked = log_probabilities.flatten(0, 2).gather(1, classes[:, None])[:, 0]
        return -(weights * picked).view(len(logits), -1).sum(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        log_probabilities, classes, weights = ctx.saved_tensors
        scale = (gradient[:, None] * weights.view(len(gradient), -1)).view(-1, 1)
        # In place, since they are not needed again; torch refuses a second backward pass over a changed tensor.
        rows = log_probabilities.flatten(0, 2).exp_().mul_(scale).scatter_add_(1, classes[:, None], -scale)
        return None, None, None, *rows.view_as(log_probabilities).to(ctx.dtype).unbind()


def _cardinality_error(log_probabilities: Tensor, targets: PackedTargets) -> Tensor:
    """Return [L], the mean over images of |queries whose best class is an object - number of objects|."""
    # `>=`, since argmax takes the first of equal values and "no object" is the last class.
    return count_error((log_probabilities[..., :-1].amax(-1) >= log_probabilities[..., -1]).sum(-1), targets)
