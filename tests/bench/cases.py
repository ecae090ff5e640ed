"""What is compared: the same work done by this package and by the original, on the same inputs and weights."""

from collections.abc import Callable

import torch
from torch import Tensor

from detr.batch import Target
from detr.config import LossConfig
from detr.criterion import compute_losses
from detr.model import Outputs
from tests.bench import peer

CLASSES = 91
QUERIES = 100
LAYERS = 6
Work = Callable[[], object]


def targets(images: int, boxes: int, device: str = "cpu") -> list[Target]:
    """Return as many random boxes for each image; the targets stay on the host, as the loader leaves them."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for number in range(images):
        centres = 0.25 + 0.5 * torch.rand(boxes, 2, generator=generator)
        extents = 0.05 + 0.4 * torch.rand(boxes, 2, generator=generator)
        labels = torch.randint(0, CLASSES, (boxes,), generator=generator)
        found.append(Target(torch.cat([centres, extents], 1), labels, number, (480, 640)))
    return found


def peer_targets(ours: list[Target], device: str) -> list[dict[str, Tensor]]:
    return [{"labels": target.labels.to(device), "boxes": target.boxes.to(device)} for target in ours]


def criterion_ours(images: int, boxes: int, device: str) -> Work:
    """Matching, losses of all layers and their gradients with respect to logits and boxes."""
    layers = _predictions(images, device)
    truth, config = targets(images, boxes), LossConfig()

    def work() -> Tensor:
        *auxiliary, last = (Outputs(logits, boxes.sigmoid()) for logits, boxes in layers)
        losses = compute_losses(last._replace(auxiliary=tuple(auxiliary)), truth, float(images * boxes), config)
        losses.total.backward()
        return losses.total.detach()

    return work


def criterion_peer(images: int, boxes: int, device: str) -> Work:
    """As `criterion_ours`, by the original's `SetCriterion`."""
    layers = _predictions(images, device)
    truth = peer_targets(targets(images, boxes), device)
    _, criterion = peer.build(device=device)

    def work() -> Tensor:
        *auxiliary, last = ({"pred_logits": logits, "pred_boxes": boxes.sigmoid()} for logits, boxes in layers)
        losses = criterion({**last, "aux_outputs": auxiliary}, truth)
        total = sum(losses[name] * weight for name, weight in criterion.weight_dict.items() if name in losses)
        total.backward()
        return total.detach()

    return work


def _predictions(images: int, device: str) -> list[tuple[Tensor, Tensor]]:
    """Logits and boxes before the sigmoid of each layer, leaves that take gradients."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(LAYERS):
        logits = torch.randn(images, QUERIES, CLASSES + 1, generator=generator).to(device).requires_grad_()
        boxes = torch.randn(images, QUERIES, 4, generator=generator).to(device).requires_grad_()
        found.append((logits, boxes))
    return found
