from dataclasses import replace

import pytest
import torch

from detr.config import ConfigError, LossConfig, ModelConfig
from detr.criterion import compute_losses
from detr.model import build_model
from detr.position import sine_vectors

TINY = ModelConfig(
    backbone="tiny", norm="group", frozen_stages=0, hidden_dim=32, heads=4, encoder_layers=1, decoder_layers=3,
    feedforward_dim=64, dropout=0.0, num_queries=9,
)  # fmt: skip


def test_every_decoder_layer_predicts_for_every_query() -> None:
    outputs = build_model(TINY, 4)(torch.randn(2, 3, 64, 80))
    assert outputs.logits.shape == (2, 9, 5)
    assert outputs.boxes.shape == (2, 9, 4)
    assert len(outputs.auxiliary) == 2
    assert 0 <= outputs.boxes.min() <= outputs.boxes.max() <= 1


def test_without_auxiliary_outputs_the_last_layer_is_the_same() -> None:
    full = build_model(TINY, 4)
    short = build_model(replace(TINY, auxiliary=False), 4)
    short.load_state_dict(full.state_dict())
    images = torch.randn(1, 3, 64, 64)
    assert short(images).auxiliary == ()
    torch.testing.assert_close(short(images).boxes, full(images).boxes)


def test_padding_that_is_nowhere_changes_nothing() -> None:
    model, images = build_model(TINY, 4), torch.randn(2, 3, 64, 80)
    unmasked, masked = model(images), model(images, torch.zeros(2, 64, 80, dtype=torch.bool))
    torch.testing.assert_close(masked.logits, unmasked.logits, rtol=1e-4, atol=1e-5)


def test_no_images_run_forward_and_backward() -> None:
    model = build_model(TINY, 4)
    losses = compute_losses(model(torch.zeros(0, 3, 64, 64)), [], 1.0, LossConfig())
    losses.total.backward()
    assert losses.total == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_boxes_stay_in_full_precision_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        outputs = build_model(TINY, 4)(torch.randn(1, 3, 64, 64))
    assert outputs.boxes.dtype == torch.float32


def test_queries_can_start_as_a_grid_of_positions() -> None:
    model = build_model(replace(TINY, query_init="grid"), 4)
    centre = sine_vectors(torch.tensor(0.5), torch.tensor(0.5), 32, 10000.0)
    torch.testing.assert_close(model.query_embed.weight[4].detach(), centre)


def test_no_classes_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_classes: got 0"):
        build_model(TINY, 0)


def test_the_model_compiles_to_the_same_outputs() -> None:
    pytest.importorskip("torch._dynamo")
    model, images = build_model(TINY, 4), torch.randn(1, 3, 64, 64)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images).boxes, model(images).boxes)
