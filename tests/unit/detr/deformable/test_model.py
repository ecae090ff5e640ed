from dataclasses import replace

import pytest
import torch
from torch import Tensor

from detr.batch import Target
from detr.compute import fsdp_units, set_channels_last, set_recompute
from detr.config import ConfigError, DeformableConfig, LossConfig, ModelConfig
from detr.criterion import compute_losses
from detr.model import DETR, build_model
from detr.variant import tensors_of

TWO_STAGE = DeformableConfig(levels=3, box_refine=True, two_stage=True)
HYBRID = replace(TWO_STAGE, mixed_selection=True, look_forward_twice=True, one_to_many_queries=4)
CONFIG = ModelConfig(
    variant="deformable",
    backbone="tiny",
    norm="group",
    frozen_stages=0,
    hidden_dim=32,
    heads=2,
    encoder_layers=1,
    decoder_layers=2,
    feedforward_dim=16,
    num_queries=5,
    dropout=0.0,
)


def built(deformable: DeformableConfig = HYBRID) -> DETR:
    torch.manual_seed(0)
    return build_model(replace(CONFIG, deformable=deformable), 3)


def images(batch: int = 2) -> tuple[Tensor, Tensor]:
    padding = torch.zeros(batch, 64, 80, dtype=torch.bool)
    padding[1:, :, 56:] = True
    drawn = torch.randn(batch, 3, 64, 80, generator=torch.Generator().manual_seed(1))
    return drawn.masked_fill(padding[:, None], 0.0), padding


def test_one_to_many_queries_change_nothing_for_the_others() -> None:
    model = built(replace(DeformableConfig(levels=3, box_refine=True), one_to_many_queries=4))
    in_training = model.train()(*images())
    alone = model.eval()(*images())
    assert in_training.one_to_many is not None
    assert alone.one_to_many is None
    torch.testing.assert_close(in_training.logits, alone.logits)
    torch.testing.assert_close(in_training.boxes, alone.boxes)


@pytest.mark.parametrize("deformable", [DeformableConfig(levels=1), DeformableConfig(levels=3), TWO_STAGE, HYBRID])
@pytest.mark.parametrize("auxiliary", [True, False])
@pytest.mark.parametrize("boxes", [(2, 0), (0, 0)], ids=["boxes", "no boxes"])
def test_every_parameter_gets_a_gradient_for_which_ddp_waits(
    deformable: DeformableConfig, auxiliary: bool, boxes: tuple[int, int]
) -> None:
    model = built(deformable)
    targets = [
        Target(torch.full((n, 4), 0.4), torch.ones(n, dtype=torch.int64), i, (9, 9)) for i, n in enumerate(boxes)
    ]
    config = LossConfig(auxiliary=auxiliary, weight_one_to_many=float(auxiliary))
    compute_losses(model(*images()), targets, 2.0, config).total.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_an_empty_batch_has_gradients() -> None:
    model = built()
    outputs = model(torch.zeros(0, 3, 64, 64))
    compute_losses(outputs, [], 1.0, LossConfig()).total.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_too_few_cells_for_the_queries_is_one_line() -> None:
    model = build_model(replace(CONFIG, num_queries=200, deformable=TWO_STAGE), 3)
    with pytest.raises(ConfigError, match=r"have 106 cells.*at least 200.*larger images"):
        model(*images())


def test_an_image_predicts_the_same_beside_a_larger_one() -> None:
    model = built(DeformableConfig(levels=3, box_refine=True)).eval()
    both, padding = images()
    alone = model(both[1:, :, :, :56])
    beside = model(both, padding)
    torch.testing.assert_close(beside.boxes[1:], alone.boxes, atol=2e-2, rtol=0)


def test_recomputing_and_channels_last_change_no_gradient() -> None:
    gradients = []
    for changed in (False, True):
        model = built()
        if changed:
            set_recompute(model, "both")
            set_channels_last(model)
        sum(tensor.sum() for tensor in tensors_of(model(*images()))).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-3, rtol=1e-3)


def test_fsdp_shards_each_layer() -> None:
    model = built()
    units = fsdp_units(model)
    layers = [*model.transformer.encoder.layers, *model.transformer.decoder.layers]
    assert [unit for unit in units if unit[0] in layers] == [[layer] for layer in layers]


def test_auxiliary_predictions_outside_training_are_an_option() -> None:
    model = built()
    last = model.eval()(*images())
    assert len(last.auxiliary) == 1
    model.config = replace(model.config, auxiliary=False)
    alone = model(*images())
    assert alone.auxiliary == ()
    assert torch.equal(alone.logits, last.logits)
