from dataclasses import replace

import pytest
import torch
from torch import Tensor

from detr.batch import Target
from detr.compute import fsdp_units, set_channels_last, set_recompute
from detr.conditional.original_config import infer_conditional, is_conditional
from detr.config import ConfigError, LossConfig, ModelConfig
from detr.criterion import compute_losses
from detr.model import DETR, build_model
from detr.original import to_original_state_dict
from detr.variant import tensors_of

CONFIG = ModelConfig(
    variant="conditional",
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


def built(**changes: object) -> DETR:
    torch.manual_seed(0)
    return build_model(replace(CONFIG, **changes), 3)


def images(batch: int = 2) -> tuple[Tensor, Tensor]:
    padding = torch.zeros(batch, 64, 80, dtype=torch.bool)
    padding[1:, :, 48:] = True
    drawn = torch.randn(batch, 3, 64, 80, generator=torch.Generator().manual_seed(1))
    return drawn.masked_fill(padding[:, None], 0.0), padding


@pytest.mark.parametrize("auxiliary", [True, False])
@pytest.mark.parametrize("boxes", [(2, 0), (0, 0), ()], ids=["boxes", "no boxes", "no images"])
def test_every_parameter_gets_a_gradient_for_which_ddp_waits(auxiliary: bool, boxes: tuple[int, ...]) -> None:
    model = built(auxiliary=auxiliary)
    targets = [
        Target(torch.full((n, 4), 0.4), torch.ones(n, dtype=torch.int64), i, (9, 9)) for i, n in enumerate(boxes)
    ]
    drawn, padding = images()
    outputs = model(drawn[: len(boxes)], padding[: len(boxes)])
    compute_losses(outputs, targets, 2.0, LossConfig(auxiliary=auxiliary)).total.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_the_first_boxes_are_at_the_reference_points_and_every_class_is_unlikely() -> None:
    model = built().eval()
    outputs = model(*images())
    reference = model.transformer.decoder.ref_point_head(model.query_embed.weight).sigmoid()
    for layer in (outputs, *outputs.auxiliary):
        torch.testing.assert_close(layer.boxes[0, :, :2], reference)
        assert (layer.boxes[..., 2:] == 0.5).all()
        assert layer.logits.sigmoid().mean() < 0.05


def test_padding_is_ignored() -> None:
    model = built(norm="frozen_batch").eval()  # group norm would see the padding
    drawn, padding = torch.randn(1, 3, 64, 256), torch.zeros(1, 64, 256, dtype=torch.bool)
    padding[:, :, 48:] = True
    changed = drawn.clone()
    changed[..., 192:] = 5.0  # beyond what the convolutions of the image read
    torch.testing.assert_close(model(changed, padding).logits, model(drawn, padding).logits, atol=0, rtol=0)
    assert not torch.equal(model(changed).logits, model(drawn).logits)


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


def test_the_configuration_is_read_from_the_tensors() -> None:
    config = replace(CONFIG, backbone="resnet18", norm="frozen_batch", position="learned", frozen_stages=2, dropout=0.1)
    state = to_original_state_dict(build_model(config, 7))
    assert is_conditional(state)
    assert infer_conditional(state, heads=2) == (config, 7)
    del state["class_embed.weight"]
    with pytest.raises(ValueError, match=r"holds no class_embed\.weight"):
        infer_conditional(state, heads=2)


@pytest.mark.parametrize("field", ["pre_norm", "masks", "position_at_input", "tied_attention_init"])
def test_departures_of_the_paper_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"{field}: got True, expected False with variant='conditional'"):
        replace(CONFIG, hidden_dim=128, heads=8, **{field: True})
