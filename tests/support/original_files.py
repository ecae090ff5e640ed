"""Files in the original's format, of models with random weights."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from detr.config import DeformableConfig, ModelConfig
from detr.model import DETR, build_model
from detr.original import to_original_state_dict

# Real backbones under a transformer that is quick to build; a mask head needs a width of 128.
QUICK: dict[str, Any] = {
    "hidden_dim": 128,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "feedforward_dim": 16,
    "num_queries": 5,
}
SMALL = ModelConfig(**(QUICK | {"backbone": "resnet18", "hidden_dim": 32}))
HYBRID = DeformableConfig(box_refine=True, two_stage=True, mixed_selection=True, one_to_many_queries=7)


def written(path: Path, config: ModelConfig = SMALL, classes: int = 91, **more: Any) -> DETR:
    """Write a model with random weights and statistics to `path`, beside `more` entries; return the model."""
    torch.manual_seed(3)
    model = build_model(config, classes).eval()
    for name, buffer in model.named_buffers():
        buffer.copy_(torch.rand(buffer.shape) + 0.5)
        assert "running" in name or "bn" in name or "downsample" in name
    torch.save({"model": to_original_state_dict(model), **more}, path)
    return model


def options(**more: Any) -> argparse.Namespace:
    """Return the `args` of a training checkpoint of the original."""
    return argparse.Namespace(**({"nheads": 8, "dilation": False, "dropout": 0.1, "aux_loss": True} | more))


def assert_same(model: DETR, other: DETR) -> None:
    state, expected = to_original_state_dict(model), to_original_state_dict(other)
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


def assert_one_line(caught: pytest.ExceptionInfo[Exception]) -> None:
    assert "\n" not in str(caught.value)
