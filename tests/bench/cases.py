"""The work that is compared: done by this package and by the original, on the same inputs and weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from detr.batch import Target
from detr.compute import Precision, Recompute, autocast, compile_shapes, set_channels_last, set_recompute
from detr.config import LossConfig, ModelConfig
from detr.criterion import compute_losses
from detr.model import DETR, Outputs, build_model
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


def peer_targets(ours: Sequence[Target], device: str) -> list[dict[str, Tensor]]:
    """Return targets as the original takes them: on the device."""
    return [{"labels": target.labels.to(device), "boxes": target.boxes.to(device)} for target in ours]


def criterion_ours(images: int, boxes: int, device: str) -> Work:
    """Return the work of matching, the losses of all layers, and their gradients by logits and boxes."""
    *auxiliary, last = layers = [Outputs(*layer) for layer in _predictions(images, device)]
    truth, config = targets(images, boxes), LossConfig()
    leaves = [leaf for layer in layers for leaf in layer[:2]]

    def work() -> Tensor:
        losses = compute_losses(last._replace(auxiliary=tuple(auxiliary)), truth, float(images * boxes), config)
        torch.autograd.grad(losses.total, leaves)
        return losses.total.detach()

    return work


def criterion_peer(images: int, boxes: int, device: str) -> Work:
    """Return the same work as `criterion_ours`, done by the original's `SetCriterion`."""
    *auxiliary, last = layers = [
        {"pred_logits": logits, "pred_boxes": boxes} for logits, boxes in _predictions(images, device)
    ]
    leaves = [leaf for layer in layers for leaf in layer.values()]
    truth = peer_targets(targets(images, boxes), device)
    _, criterion = peer.build(device=device)

    def work() -> Tensor:
        losses = criterion({**last, "aux_outputs": auxiliary}, truth)
        total = sum(losses[name] * weight for name, weight in criterion.weight_dict.items() if name in losses)
        torch.autograd.grad(total, leaves)
        return total.detach()

    return work


def _predictions(images: int, device: str) -> list[tuple[Tensor, Tensor]]:
    """Return logits and boxes of each layer, leaves with gradients."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(LAYERS):
        logits = torch.randn(images, QUERIES, CLASSES + 1, generator=generator).to(device).requires_grad_()
        boxes = torch.randn(images, QUERIES, 4, generator=generator).sigmoid().to(device).requires_grad_()
        found.append((logits, boxes))
    return found


@dataclass(frozen=True)
class Options:
    """Options of this package's model; the defaults are those of training."""

    channels_last: bool = True
    precision: Precision = "fp32"
    compile: bool = False
    recompute: Recompute = "none"


Step = Callable[[Tensor, Tensor | None, Sequence[Target]], Tensor]


def training_ours(options: Options, device: str, config: ModelConfig | None = None) -> Step:
    """Return one training step, of R50 by default: forward, losses, backward, clip, the check of the gradient, AdamW."""
    model = build_model(config or ModelConfig(), CLASSES).to(device).train()
    configure(model, options)
    optimizer = torch.optim.AdamW(groups(model), lr=1e-4, weight_decay=1e-4, fused=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    loss = LossConfig()

    def step(images: Tensor, padding: Tensor | None, truth: Sequence[Target]) -> Tensor:
        optimizer.zero_grad()  # as in a run: the last gradients are freed before the activations are allocated
        with autocast(images.device, options.precision):
            outputs = model(images, padding)
        boxes = sum(len(target.labels) for target in truth)
        losses = compute_losses(outputs, truth, float(max(boxes, 1)), loss)
        losses.total.backward()
        if not torch.isfinite(nn.utils.clip_grad_norm_(parameters, 0.1)):
            raise RuntimeError("the gradient is not finite")
        optimizer.step()
        return losses.total.detach()

    return step


def training_peer(precision: Precision, device: str) -> Step:
    """Return the step of the original's `engine.py`, which reads the loss in every step."""
    model, criterion = peer.build(device=device)
    model.train()
    criterion.train()
    optimizer = torch.optim.AdamW(groups(model), lr=1e-4, weight_decay=1e-4)

    def step(images: Tensor, padding: Tensor | None, truth: Sequence[Target]) -> Tensor:
        moved = peer_targets(truth, device)
        with autocast(images.device, precision):
            outputs = model(peer.nested(images, mask(images, padding)))
            losses = criterion(outputs, moved)
        total = sum(losses[name] * weight for name, weight in criterion.weight_dict.items() if name in losses)
        if not torch.isfinite(total).item():
            raise RuntimeError("the original's loss is not finite")
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        return total.detach()

    return step


def step_ours(images: Tensor, padding: Tensor | None, boxes: int, options: Options) -> Work:
    """Return one training step of this package, always on the same batch."""
    return partial(training_ours(options, images.device.type), images, padding, targets(len(images), boxes))


def step_peer(images: Tensor, padding: Tensor | None, boxes: int) -> Work:
    """Return the same step as `step_ours`, done by the original."""
    return partial(training_peer("fp32", images.device.type), images, padding, targets(len(images), boxes))


def inference_ours(images: Tensor, padding: Tensor | None, options: Options) -> Work:
    """Return the inference of R50 in evaluation mode."""
    model = build_model(ModelConfig(), CLASSES).to(images.device).eval()
    configure(model, options)

    @torch.inference_mode()
    def work() -> Tensor:
        with autocast(images.device, options.precision):
            boxes: Tensor = model(images, padding).boxes
        return boxes

    return work


def inference_peer(images: Tensor, padding: Tensor | None, precision: Precision = "fp32") -> Work:
    """Return the same inference by the original, also in inference mode, which its own evaluation does not use."""
    model, _ = peer.build(device=images.device.type)
    model.eval()
    samples = peer.nested(images, mask(images, padding))

    @torch.inference_mode()
    def work() -> Tensor:
        with autocast(images.device, precision):
            boxes: Tensor = model(samples)["pred_boxes"]
        return boxes

    return work


def configure(model: DETR, options: Options) -> None:
    """Prepare a model as a run does."""
    if options.channels_last:
        set_channels_last(model)
    set_recompute(model, options.recompute)
    if options.compile:
        compile_shapes(model)


def mask(images: Tensor, padding: Tensor | None) -> Tensor:
    return torch.zeros_like(images[:, 0], dtype=torch.bool) if padding is None else padding


def groups(model: nn.Module) -> list[dict[str, object]]:
    """Return the original's two parameter groups: the backbone learns at a tenth of the rate."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for name, parameter in named if "backbone" not in name]},
        {"params": [parameter for name, parameter in named if "backbone" in name], "lr": 1e-5},
    ]
