"""Set loss of models with sigmoid classes: focal loss, L1 and generalised IoU of matched pairs, in every decoder layer.

Names and divisors are the original's. Everything is divided by the number of boxes, the focal loss too. Three sets of
predictions are matched, each by itself:

- the layers of the decoder;
- with two stages, the cells of the encoder, without suffix `_0`, ... but with `_enc`: every object has class 0 there. As in
  the original, they are reported but not trained if auxiliary losses are off;
- with hybrid matching, the one-to-many queries, with the suffix `_one2many`: every object is there several times.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from detr.batch import Target
from detr.config import LossConfig
from detr.losses.focal import focal_loss
from detr.losses.matched import box_losses, class_error, count_error, named, zero_with_gradient
from detr.matcher import PackedTargets, focal_cost, match_layers, pack
from detr.position import at_least_fp32
from detr.variant import SigmoidOutputs, tensors_of


@dataclass(frozen=True)
class _Set:
    """Predictions that are matched together, with their objects, the divisor of their losses and a factor on all terms."""

    suffix: str
    layers: Sequence[SigmoidOutputs]
    targets: PackedTargets
    divisor: float | Tensor
    factor: float = 1.0
    trained: bool = True


def sigmoid_losses(
    outputs: SigmoidOutputs,
    targets: Sequence[Target],
    num_boxes: float | Tensor,
    config: LossConfig,
    num_copies: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted sum of all losses and each of them by name, as `detr.criterion.compute_losses`."""
    packed = pack(targets, outputs.logits.shape[-1], outputs.logits.device)
    sets = [_Set("", _layers(outputs, config), packed, num_boxes)]
    if outputs.encoder is not None:
        cells = replace(packed, labels=torch.zeros_like(packed.labels))
        sets.append(_Set("_enc", [outputs.encoder], cells, num_boxes, trained=config.auxiliary))
    many, copies = outputs.one_to_many, config.one_to_many_copies
    if many is not None and copies:
        repeated = [replace(t, boxes=t.boxes.repeat(copies, 1), labels=t.labels.repeat(copies)) for t in targets]
        again = pack(repeated, outputs.logits.shape[-1], outputs.logits.device)
        if num_copies is None:
            num_copies = copies * num_boxes if len(packed.labels) else num_boxes
        weight = config.weight_one_to_many
        sets.append(_Set("_one2many", _layers(many, config), again, num_copies, weight, trained=weight > 0))
    # Every prediction gets a gradient, since DDP waits for those of all heads.
    weighted = [zero_with_gradient(tensors_of(outputs))]
    terms: dict[str, Tensor] = {}
    weights = {"loss_ce": config.weight_ce, "loss_bbox": config.weight_bbox, "loss_giou": config.weight_giou}
    for found in sets:
        per_layer = _losses(found, config)
        if found.trained:
            # Losses of weight 0 are left out, since 0 times NaN is NaN.
            weighted += [weight * per_layer[name].sum() for name, weight in weights.items() if weight]
        terms |= named(per_layer, found.suffix)
    return torch.stack(weighted).sum(), terms


def _layers(outputs: SigmoidOutputs, config: LossConfig) -> list[SigmoidOutputs]:
    return [outputs, *(outputs.auxiliary if config.auxiliary else ())]


def _losses(found: _Set, config: LossConfig) -> dict[str, Tensor]:
    """Return the losses [L] of a set, the error of cardinality [L], and the class error of its last layer, [1]."""
    logits = at_least_fp32(torch.stack([layer.logits for layer in found.layers]))
    boxes = torch.stack([layer.boxes for layer in found.layers])
    matched = match_layers(logits.detach().float(), boxes.detach(), found.targets, config, focal_cost)
    labels = found.targets.labels[matched.truth]
    sums = {
        "loss_ce": focal_loss(logits, matched.slot, labels, config.focal_alpha),
        **box_losses(boxes, found.targets, matched),
    }
    terms = {name: value / found.divisor for name, value in sums.items()}
    # As in the original, queries whose best class is the last count as no object, which means nothing here.
    terms["cardinality_error"] = count_error(
        (logits.detach().argmax(-1) != logits.shape[-1] - 1).sum(-1), found.targets
    )
    if found.suffix != "_enc":
        terms["class_error"] = class_error(logits.detach(), labels, matched)[None]
    return terms if found.factor == 1 else {name: found.factor * value for name, value in terms.items()}
