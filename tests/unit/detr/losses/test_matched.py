"""Losses of matched boxes have autograd's values and gradients; reports of counts."""

import pytest
import torch
from torch import Tensor

from detr.losses.matched import box_losses, count_error
from detr.matcher import Assignment, PackedTargets, generalized_iou

LAYERS, PAIRS = 3, 40


def drawn() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = 0.02 + 0.5 * torch.rand(2, LAYERS * PAIRS, 4, generator=generator, dtype=torch.float64)
    return made[0], made[1]


def points(boxes: Tensor) -> Tensor:
    return boxes * boxes.new_tensor([1, 1, 0, 0])


@pytest.mark.parametrize("case", ["apart and overlapping", "equal", "points", "points on points", "around"])
def test_box_losses_have_autograds_gradient(case: str) -> None:
    predicted, true = drawn()
    match case:
        case "equal":
            true = predicted.clone()
        case "points":
            predicted = points(predicted)
        case "points on points":
            predicted, true = points(predicted), points(predicted)
        case "around":
            predicted = predicted + predicted.new_tensor([0, 0, 3, 3])
    weights = torch.rand(2, LAYERS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    boxes = predicted.view(LAYERS, 1, PAIRS, 4).requires_grad_()
    targets = PackedTargets(torch.zeros(len(true)), true, torch.zeros(len(true)), (len(true),), (1,))
    rows = torch.arange(len(true))
    found = box_losses(boxes, targets, Assignment(rows, rows, rows, rows, rows))
    flat = boxes.flatten(0, 2)
    expected = {
        "loss_bbox": (flat - true).abs().view(LAYERS, -1).sum(1),
        "loss_giou": (1 - generalized_iou(flat, true)).view(LAYERS, -1).sum(1),
    }
    assert found.keys() == expected.keys()
    gradients = []
    for losses in (found, expected):
        total = torch.stack([losses["loss_bbox"], losses["loss_giou"]]).mul(weights).sum()
        gradients.append(torch.autograd.grad(total, boxes, retain_graph=True)[0])
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_too_many_objects_in_an_image_do_not_make_up_for_too_few_in_another() -> None:
    targets = PackedTargets(torch.zeros(5), torch.zeros(5, 4), torch.zeros(5), (3, 2), (1, 2))
    assert count_error(torch.tensor([[3, 2], [5, 0]]), targets).tolist() == [0.0, 2.0]
