from dataclasses import replace

import pytest
import torch

from detr.conditional.original_config import infer_conditional, is_conditional
from detr.config import ConfigError
from detr.model import build_model
from detr.original import to_original_state_dict
from tests.support.variants import VARIANTS, built, images

CONFIG = VARIANTS["conditional"]


def test_the_first_boxes_are_at_the_reference_points_and_every_class_is_unlikely() -> None:
    model = built(CONFIG).eval()
    outputs = model(*images())
    reference = model.transformer.decoder.ref_point_head(model.query_embed.weight).sigmoid()
    for layer in (outputs, *outputs.auxiliary):
        torch.testing.assert_close(layer.boxes[0, :, :2], reference)
        assert (layer.boxes[..., 2:] == 0.5).all()
        assert layer.logits.sigmoid().mean() < 0.05


def test_padding_is_ignored() -> None:
    model = built(CONFIG, norm="frozen_batch").eval()  # group norm would see the padding
    drawn, padding = torch.randn(1, 3, 64, 256), torch.zeros(1, 64, 256, dtype=torch.bool)
    padding[:, :, 48:] = True
    changed = drawn.clone()
    changed[..., 192:] = 5.0  # beyond what the convolutions of the image read
    torch.testing.assert_close(model(changed, padding).logits, model(drawn, padding).logits, atol=0, rtol=0)
    assert not torch.equal(model(changed).logits, model(drawn).logits)


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
