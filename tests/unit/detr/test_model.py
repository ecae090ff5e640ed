from dataclasses import replace
from typing import Any

import pytest
import torch

from detr.batch import Target, collate
from detr.config import ConfigError, LossConfig, ModelConfig
from detr.criterion import compute_losses
from detr.model import build_model
from detr.position import sine_vectors
from detr.postprocess import detect

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


def test_all_false_padding_equals_no_padding() -> None:
    model, images = build_model(TINY, 4), torch.randn(2, 3, 64, 80)
    unmasked, masked = model(images), model(images, torch.zeros(2, 64, 80, dtype=torch.bool))
    torch.testing.assert_close(masked.logits, unmasked.logits, rtol=1e-4, atol=1e-5)


def test_model_accepts_a_batch_without_images() -> None:
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


ODD = {
    "no encoder": {"encoder_layers": 0},
    "no encoder, pre-norm": {"encoder_layers": 0, "pre_norm": True},
    "one decoder layer": {"decoder_layers": 1},
    "one query": {"num_queries": 1},
    "seven queries": {"num_queries": 7},
    "one head": {"heads": 1},
    "least": {"encoder_layers": 0, "decoder_layers": 1, "num_queries": 1, "heads": 1, "hidden_dim": 4, "feedforward_dim": 1},
    "learned positions": {"position": "learned", "pre_norm": True, "heads": 2},
    "no auxiliary losses": {"auxiliary": False},
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("changes", ODD.values(), ids=ODD.keys())
def test_models_of_all_sizes_train_and_detect(changes: dict[str, Any], padded: bool, training: bool) -> None:
    config = replace(TINY, dropout=0.1, **changes)
    torch.manual_seed(0)
    model = build_model(config, 4).train(training)
    sizes = [(64, 80), (48, 33) if padded else (64, 80)]
    truth = [
        Target(torch.tensor([[0.5, 0.5, 0.2, 0.4]]).repeat(n, 1), torch.arange(n) % 4, n, (90, 120)) for n in (2, 0)
    ]
    batch = collate([(torch.randn(3, *size), target) for size, target in zip(sizes, truth, strict=True)])
    assert (batch.padding is not None) == padded
    outputs = model(batch.images, batch.padding)
    assert outputs.logits.shape == (2, config.num_queries, 5)
    assert len(outputs.auxiliary) == (config.decoder_layers - 1 if config.auxiliary else 0)
    losses = compute_losses(outputs, batch.targets, 2.0, LossConfig())
    losses.total.backward()
    assert losses.total.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert model.query_embed.weight.grad is not None
    assert model.query_embed.weight.grad.any()
    for merge in (False, True):
        found = detect(outputs, [(90, 120)] * 2, nms=0.7, merge=merge)
        assert all(
            0 < len(image.scores) <= config.num_queries * (1 + merge * len(outputs.auxiliary)) for image in found
        )
    assert [len(image.scores) for image in detect(outputs, [(90, 120)] * 2)] == [config.num_queries] * 2


def test_no_classes_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_classes: got 0"):
        build_model(TINY, 0)


def test_the_model_compiles_to_the_same_outputs() -> None:
    pytest.importorskip("torch._dynamo")
    model, images = build_model(TINY, 4), torch.randn(1, 3, 64, 64)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images).boxes, model(images).boxes)
