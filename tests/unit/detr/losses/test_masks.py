from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from detr.config import ConfigError, LossConfig
from detr.criterion import compute_losses
from detr.losses.masks import mask_losses
from detr.matcher import match, match_layers, pack
from detr.model import Outputs
from tests.support.masked_model import build_masked, drawn_targets


def test_mask_losses_equal_their_definitions_on_the_canvas() -> None:
    """The expected values are computed pair by pair: upsample to the canvas, then focal and DICE loss."""
    torch.manual_seed(0)
    targets = drawn_targets(2, 0, 3)
    logits, boxes = torch.randn(3, 6, 5), torch.rand(3, 6, 4) * 0.5 + 0.2
    outputs = Outputs(logits, boxes, (Outputs(torch.randn(3, 6, 5), boxes.flip(1)),), 3 * torch.randn(3, 6, 17, 21))
    for canvas in (None, (68, 84)):
        focal, dice = 0.0, 0.0
        for i, (queries, found) in enumerate(match(outputs, targets, LossConfig())):
            for query, j in zip(queries.tolist(), found.tolist(), strict=True):
                truth = torch.zeros(canvas or (64, 80))
                height, width = targets[i].masks.shape[1:]
                truth[:height, :width] = targets[i].masks[j]
                x = F.interpolate(outputs.masks[i, query][None, None], truth.shape, mode="bilinear")[0, 0]
                p = x.sigmoid()
                ce = F.binary_cross_entropy(p, truth, reduction="none")
                weight = (0.25 * truth + 0.75 * (1 - truth)) * (1 - (p * truth + (1 - p) * (1 - truth))) ** 2
                focal += (weight * ce).mean().item()
                dice += 1 - ((2 * (p * truth).sum() + 1) / (p.sum() + truth.sum() + 1)).item()
        got = compute_losses(outputs, targets, 2.5, LossConfig(weight_mask=3.0, weight_dice=7.0), canvas=canvas)
        assert got.parts["loss_mask"].item() == pytest.approx(focal / 2.5, rel=1e-4)
        assert got.parts["loss_dice"].item() == pytest.approx(dice / 2.5, rel=1e-4)
        without = compute_losses(outputs._replace(masks=None), targets, 2.5, LossConfig())
        assert (got.total - without.total).item() == pytest.approx((3 * focal + 7 * dice) / 2.5, rel=1e-4)
        assert got.parts.keys() - without.parts.keys() == {"loss_mask", "loss_dice"}


@pytest.mark.parametrize("objects", [(), (0,), (0, 0)], ids=["no images", "no boxes", "two without boxes"])
def test_mask_head_gets_zero_gradients_without_objects(objects: tuple[int, ...]) -> None:
    model, targets = build_masked(), drawn_targets(*objects)
    losses = compute_losses(model(torch.randn(len(objects), 3, 64, 80)), targets, 1.0, LossConfig())
    losses.total.backward()
    assert losses.parts["loss_mask"] == losses.parts["loss_dice"] == 0
    head = [*model.bbox_attention.parameters(), *model.mask_head.parameters()]
    assert all(p.grad is not None and not p.grad.any() for p in head)


def test_mask_losses_give_gradients_to_head_and_backbone() -> None:
    model = build_masked()
    config = LossConfig(weight_ce=0, weight_bbox=0, weight_giou=0)
    compute_losses(model(torch.randn(2, 3, 64, 80)), drawn_targets(2, 3), 5.0, config).total.backward()
    learns = [*model.bbox_attention.parameters(), *model.mask_head.parameters(), *model.backbone.parameters()]
    assert all(p.grad is not None and p.grad.any() for p in learns)


def test_losses_stay_in_full_precision_under_autocast() -> None:
    model, images, targets = build_masked().eval(), torch.randn(2, 3, 64, 80), drawn_targets(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(images)
        got = compute_losses(outputs, targets, 5.0, LossConfig()).parts
    assert outputs.masks.dtype == torch.bfloat16
    exact = compute_losses(outputs._replace(masks=outputs.masks.float()), targets, 5.0, LossConfig()).parts
    for name in ("loss_mask", "loss_dice"):
        assert got[name].dtype == torch.float32
        assert torch.equal(got[name], exact[name])


def test_images_without_masks_are_refused() -> None:
    with_masks, without = drawn_targets(2, 3)
    targets = [with_masks, replace(without, masks=None)]
    with pytest.raises(ConfigError, match="image 1: got no masks, expected 3 for the model's mask head"):
        compute_losses(build_masked()(torch.randn(2, 3, 64, 80)), targets, 5.0, LossConfig())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_mask_losses_wait_for_the_device_only_in_the_matcher() -> None:
    targets = [replace(target, masks=target.masks.pin_memory()) for target in drawn_targets(2, 3)]
    outputs = build_masked().cuda()(torch.randn(2, 3, 64, 80, device="cuda"))
    found = match_layers(
        outputs.logits.detach()[None], outputs.boxes.detach()[None], pack(targets, 4, outputs.logits.device),
        LossConfig(),
    )  # fmt: skip
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums = mask_losses(outputs.masks, targets, found, 1, (64, 80))
        (sums["loss_mask"] + sums["loss_dice"]).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sums["loss_mask"] > 0
