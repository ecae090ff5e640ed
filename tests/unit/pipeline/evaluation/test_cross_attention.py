"""Cross-attention as the last decoder layer computes it, and only when it is asked for."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detr.config import DeformableConfig, ModelConfig
from detr.model import build_model
from detr.postprocess import detect, detecting_queries
from detr.transformer import Attention
from detr.variant import DETR, tensors_of
from pipeline.evaluation.cross_attention import CellWeights, PointWeights, _weights, attend_with

PLAIN = ModelConfig(
    backbone="tiny", norm="group", frozen_stages=0, hidden_dim=32, heads=4, encoder_layers=1, decoder_layers=3,
    feedforward_dim=64, dropout=0.1, num_queries=9,
)  # fmt: skip
CONDITIONAL = replace(PLAIN, variant="conditional")
DEFORMABLE = replace(PLAIN, variant="deformable", deformable=DeformableConfig(levels=3, box_refine=True))


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    """Return two images; the right half of the second is padding."""
    padding = torch.zeros(2, 64, 96, dtype=torch.bool)
    padding[1, :, 48:] = True
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)).masked_fill(padding[:, None], 0.0)
    return pixels, padding


def built(config: ModelConfig) -> DETR:
    torch.manual_seed(0)
    model = build_model(config, 4).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "cross_attn" in name or "multihead_attn" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))  # first weights look nearly everywhere alike
    return model


@pytest.mark.parametrize("pre_norm", [False, True])
def test_weights_are_those_of_torchs_attention_on_the_inputs_of_the_last_layer(
    images: tuple[Tensor, Tensor], pre_norm: bool
) -> None:
    model = built(replace(PLAIN, pre_norm=pre_norm))
    layer = model.transformer.decoder.layers[-1].multihead_attn
    calls: list[Any] = []
    layer.register_forward_hook(lambda *call: calls.append(call))
    _, found = attend_with(model, *images)
    (_, (query, key, value, mask), output) = calls[0]
    reference = nn.MultiheadAttention(32, 4, batch_first=True)
    reference.load_state_dict(layer.state_dict())
    expected, weights = reference.eval()(query, key, value, ~mask[:, 0, 0], need_weights=True)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert isinstance(found, CellWeights)
    torch.testing.assert_close(found.weights.flatten(2), weights, rtol=1e-4, atol=1e-6)
    assert found.weights.shape == (2, 9, 4, 6)
    torch.testing.assert_close(found.weights.sum((2, 3)), torch.ones(2, 9))
    assert not found.weights[1, ..., 3:].any(), "padded cells are read"
    torch.testing.assert_close(found.weights[1, ..., :3].sum((1, 2)), torch.ones(9))
    assert found.weights.flatten(2).std(-1).min() > 0


def test_points_of_deformable_attention_give_the_output_of_the_layer(images: tuple[Tensor, Tensor]) -> None:
    model = built(DEFORMABLE)
    layer = model.transformer.decoder.layers[-1].cross_attn
    calls: list[Any] = []
    layer.register_forward_hook(lambda *call: calls.append(call))
    _, found = attend_with(model, *images)
    (_, (query, _, cells, padding, shapes), output) = calls[0]
    assert isinstance(found, PointWeights)
    assert found.locations.shape == (2, 9, 4 * 3 * 4, 2)
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(2, 9))
    # Own formula: each point is read from its level with grid_sample, and weighted.
    value = layer.value_proj(cells).masked_fill(padding[..., None], 0.0).view(2, -1, 4, 8)
    points, weights = found.locations.view(2, 9, 4, 3, 4, 2), found.weights.view(2, 9, 4, 3, 4) * 4
    summed = torch.zeros(2, 9, 4, 8)
    start = 0
    for level, (height, width) in enumerate(shapes):
        for head in range(4):
            cells_of_level = value[:, start : start + height * width, head].transpose(1, 2).view(2, 8, height, width)
            read = F.grid_sample(cells_of_level, 2 * points[:, :, head, level] - 1, align_corners=False)
            summed[:, :, head] += (read * weights[:, None, :, head, level]).sum(-1).transpose(1, 2)
        start += height * width
    torch.testing.assert_close(layer.output_proj(summed.flatten(2)), output, rtol=1e-4, atol=1e-5)
    assert query.shape == (2, 9, 32)


def test_weights_of_conditional_attention_give_the_output_of_the_layer(images: tuple[Tensor, Tensor]) -> None:
    """Contents and positions are side by side there, already projected and split into heads."""
    model = built(CONDITIONAL)
    layer = model.transformer.decoder.layers[-1].cross_attn
    calls: list[Any] = []
    layer.register_forward_hook(lambda *call: calls.append(call))
    _, found = attend_with(model, *images)
    (_, (query, key, value, mask), output) = calls[0]
    weights = _weights(layer, query, key, value, mask)
    torch.testing.assert_close(layer.out_proj((weights @ value).transpose(1, 2).flatten(2)), output)
    assert isinstance(found, CellWeights)
    torch.testing.assert_close(found.weights.flatten(2), weights.mean(1))
    assert not found.weights[1, ..., 3:].any()


@pytest.mark.parametrize("config", [PLAIN, CONDITIONAL, DEFORMABLE, replace(DEFORMABLE, deformable=DeformableConfig())])
def test_predictions_are_bitwise_those_of_a_pass_without_it_and_no_hook_stays(
    images: tuple[Tensor, Tensor], config: ModelConfig
) -> None:
    model = built(config)
    with torch.inference_mode():
        before = tensors_of(model(*images))
    during = tensors_of(attend_with(model, *images)[0])
    with torch.inference_mode():
        after = tensors_of(model(*images))
    assert all(map(torch.equal, before, during))
    assert all(map(torch.equal, before, after))
    assert not [name for name, module in model.named_modules() if module._forward_hooks]


def test_a_pass_that_is_not_asked_computes_no_weights(
    images: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    import pipeline.evaluation.cross_attention as module

    def fail(*_: object) -> None:
        raise AssertionError("weights were computed")

    monkeypatch.setattr(module, "_weights", fail)
    model = built(PLAIN)
    model(*images)
    with pytest.raises(AssertionError, match="weights were computed"):
        attend_with(model, *images)
    assert not [name for name, module in model.named_modules() if module._forward_hooks]


@pytest.mark.parametrize("config", [PLAIN, DEFORMABLE])
def test_each_detection_has_its_query(images: tuple[Tensor, Tensor], config: ModelConfig) -> None:
    model = built(config)
    with torch.inference_mode():
        outputs = model(*images)
    found, queries = detect(outputs, [(64, 96), (64, 96)]), detecting_queries(outputs)
    for number, detection in enumerate(found):
        centre, extent = outputs.boxes[number, queries[number]].chunk(2, -1)
        boxes = torch.cat([centre - extent / 2, centre + extent / 2], -1) * torch.tensor([96.0, 64.0, 96.0, 64.0])
        torch.testing.assert_close(detection.boxes_xyxy, boxes)


def test_weights_of_one_head_are_softmax_of_scaled_products() -> None:
    attention = Attention(replace(PLAIN, hidden_dim=8, heads=1))
    query, key = torch.randn(1, 2, 8), torch.randn(1, 5, 8)
    (wq, wk, _), (bq, bk, _) = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    scores = (query @ wq.T + bq) @ (key @ wk.T + bk).transpose(1, 2) / math.sqrt(8)
    torch.testing.assert_close(_weights(attention, query, key, key)[:, 0], scores.softmax(-1))
