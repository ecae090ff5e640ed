import torch
from torch.nn import functional as F

from detr.losses.focal import focal_loss


def test_sums_and_gradients_equal_the_definition() -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(2, 3, 4, 5, dtype=torch.float64)).requires_grad_()
    slots, labels = torch.tensor([1, 7, 13, 20]), torch.tensor([0, 4, 2, 2])
    truth = torch.zeros(24, 5, dtype=torch.float64)
    truth[slots, labels] = 1
    truth = truth.view(2, 3, 4, 5)
    p = logits.sigmoid()
    ce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    right = p * truth + (1 - p) * (1 - truth)
    expected = ((0.3 * truth + 0.7 * (1 - truth)) * ce * (1 - right) ** 2).flatten(1).sum(1)
    found = focal_loss(logits, slots, labels, 0.3)
    torch.testing.assert_close(found, expected)
    weights = torch.tensor([1.0, -2.0], dtype=torch.float64)
    (wanted,) = torch.autograd.grad(expected @ weights, logits)
    torch.testing.assert_close(torch.autograd.grad(found @ weights, logits)[0], wanted)


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([-1e4, 1e4, -88.0, 88.0]).view(1, 1, 2, 2).requires_grad_()
    loss = focal_loss(logits, torch.tensor([0]), torch.tensor([0]), 0.25)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
