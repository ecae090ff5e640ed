"""Sums per rank give the gradient of the original, which divides by the boxes of each GPU's images."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from detr.batch import Target, collate, normalise
from detr.matcher import generalized_iou, match
from detr.model import Outputs
from pipeline.config import RunConfig
from pipeline.distributed.ranks import Ranks
from pipeline.training.model import build_trainable_model
from tests.support.rank_gradients import CASES, Gradients, all_gradients, assert_equal, evenly, gradients
from tests.support.ranks import run_ranks
from tests.support.step_samples import CONFIG, samples


def per_rank(config: RunConfig) -> RunConfig:
    return replace(config, optim=replace(config.optim, normalise="per_rank"))


def gradients_per_rank(ranks: Ranks, shares: list[tuple[int, ...]], passes: int) -> list[Gradients]:
    return [gradients(ranks, shares, boxes, per_rank(CONFIG), passes) for boxes in CASES]


def originals(shares: list[tuple[int, ...]], boxes: tuple[int, ...]) -> Gradients:
    """Return the gradient of the original with one GPU per share: `SetCriterion`'s formulas, and DDP's mean of gradients."""
    made = samples(boxes)
    num_boxes = max(sum(boxes) / len(shares), 1.0)
    found: dict[str, Tensor] = {}
    total = 0.0
    for share in shares:
        torch.manual_seed(0)
        model = build_trainable_model(CONFIG, 4).train()
        batch = collate([made[i] for i in share])
        outputs = model(normalise(batch, CONFIG.transform), batch.padding)
        loss = torch.zeros(())
        for layer in (outputs, *outputs.auxiliary):
            loss = loss + original_losses(layer, batch.targets, num_boxes)
        loss.backward()  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[name] = found.get(name, torch.zeros_like(parameter)) + parameter.grad / len(shares)
        total += float(loss.detach()) / len(shares)
    return found, total


def original_losses(layer: Outputs, targets: Sequence[Target], num_boxes: float) -> Tensor:
    """Return loss_labels and loss_boxes of the original's `models/detr.py`, weighted."""
    pairs = match(layer, targets, CONFIG.loss)
    classes = torch.full(layer.logits.shape[:2], 4)
    for image, ((queries, objects), target) in enumerate(zip(pairs, targets, strict=True)):
        classes[image, queries] = target.labels[objects]
    empty_weight = torch.ones(5)
    empty_weight[-1] = CONFIG.loss.eos_coef
    loss = nn.functional.cross_entropy(layer.logits.transpose(1, 2), classes, empty_weight)
    source = torch.cat([layer.boxes[image, queries] for image, (queries, _) in enumerate(pairs)])
    truth = torch.cat([target.boxes[objects] for (_, objects), target in zip(pairs, targets, strict=True)])
    l1 = (source - truth).abs().sum() / num_boxes
    giou = (1 - generalized_iou(source, truth)).sum() / num_boxes
    return loss + CONFIG.loss.weight_bbox * l1 + CONFIG.loss.weight_giou * giou


@pytest.mark.parametrize(
    ("shares", "passes"),
    [(evenly(2), 1), ([(0, 1, 2, 3, 4), (5, 6, 7)], 1), (evenly(2), 2)],
    ids=["2x4", "5 and 3", "2x(2x2), as on four GPUs"],
)
def test_per_rank_normalisation_gives_the_gradient_of_the_original(shares: list[tuple[int, ...]], passes: int) -> None:
    parts = [
        share[len(share) * n // passes : len(share) * (n + 1) // passes] for share in shares for n in range(passes)
    ]
    expected = [originals(parts, boxes) for boxes in CASES]
    for found_by_rank in run_ranks(len(shares), gradients_per_rank, shares, passes):
        for found, expected_of_case in zip(found_by_rank, expected, strict=True):
            assert_equal(found, expected_of_case)
    # Where ranks differ in what they hold, so do the two ways: else nothing is tested here.
    for per_rank_sums, global_sums in list(zip(expected, all_gradients(Ranks(), evenly(1)), strict=True))[1:]:
        assert abs(per_rank_sums[1] - global_sums[1]) > 1e-2
