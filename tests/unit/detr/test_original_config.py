"""The configuration is inferred from tensors of full size, on the meta device, where they need no memory."""

from typing import Any

import pytest
import torch
from torch import Tensor

from detr.config import ConfigError, ModelConfig
from detr.model import build_model
from detr.original import to_original_state_dict
from detr.original_config import heads_of_mask_head, infer_config

SMALL: dict[str, Any] = {
    "backbone": "resnet18",
    "hidden_dim": 32,
    "heads": 4,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "feedforward_dim": 64,
    "num_queries": 9,
}


def state_of(config: ModelConfig, classes: int) -> dict[str, Tensor]:
    with torch.device("meta"):
        return to_original_state_dict(build_model(config, classes))


@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
@pytest.mark.parametrize(
    ("backbone", "dilation"), [("resnet50", False), ("resnet50", True), ("resnet101", False), ("resnet101", True)]
)
def test_configs_of_the_papers_models_are_found(backbone: Any, dilation: bool, masks: bool) -> None:
    config, classes = ModelConfig(backbone=backbone, dilation=dilation, masks=masks), 250 if masks else 91
    assert infer_config(state_of(config, classes), dilation=dilation) == (config, classes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"backbone": "resnet34"},
        {"hidden_dim": 64},
        {"encoder_layers": 0},
        {"encoder_layers": 11, "decoder_layers": 12},  # two digits
        {"feedforward_dim": 48},
        {"num_queries": 1},
        {"pre_norm": True},
        {"position": "learned"},
        {"dropout": 0.0, "auxiliary": False},
    ],
    ids=str,
)
def test_configs_of_other_models_are_found(changes: dict[str, Any]) -> None:
    config = ModelConfig(**(SMALL | changes))
    unseen = {"heads": 4, "dropout": config.dropout, "auxiliary": config.auxiliary}
    assert infer_config(state_of(config, 3), **unseen) == (config, 3)


def test_a_mask_head_shows_the_number_of_heads() -> None:
    config = ModelConfig(**(SMALL | {"hidden_dim": 128, "heads": 16, "masks": True}))
    state = state_of(config, 3)
    assert heads_of_mask_head(state) == 16
    assert infer_config(state) == (config, 3)
    assert heads_of_mask_head(state_of(ModelConfig(**SMALL), 3)) is None


def test_batch_counters_do_not_matter() -> None:
    state = state_of(ModelConfig(**SMALL), 3)
    state["backbone.0.body.bn1.num_batches_tracked"] = torch.tensor(1)
    assert infer_config(state, heads=4)[0] == ModelConfig(**SMALL)


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("class_embed.weight", None, r"holds no class_embed\.weight, expected a DETR's state dict"),
        ("query_embed.weight", None, r"holds no query_embed\.weight"),
        ("backbone.0.body.conv1.weight", None, r"holds no backbone\.0\.body\.conv1\.weight"),
        ("transformer.decoder.layers.0.linear1.weight", None, r"holds no transformer\.decoder\.layers\.0"),
        ("query_embed.weight", torch.zeros(9), "has 1 dimensions, expected 2"),
        ("class_embed.weight", torch.zeros(1, 32), "1 rows, expected a class and 'no object'"),
        ("backbone.0.body.layer3.2.conv1.weight", torch.zeros(1), "stages of 2, 2, 3, 2 blocks, expected a ResNet"),
    ],
)
def test_foreign_state_dict_error_explains_why(key: str, tensor: Tensor | None, message: str) -> None:
    state = state_of(ModelConfig(**SMALL), 3)
    if tensor is None:
        del state[key]
    else:
        state[key] = tensor
    with pytest.raises(ValueError, match=message) as caught:
        infer_config(state)
    assert "\n" not in str(caught.value)


def test_impossible_heads_are_refused() -> None:
    with pytest.raises(ConfigError, match="hidden_dim: got 32, expected a multiple of heads=5"):
        infer_config(state_of(ModelConfig(**SMALL), 3), heads=5)
    masks = state_of(ModelConfig(**(SMALL | {"hidden_dim": 128, "heads": 8, "masks": True})), 3)
    masks["mask_head.lay1.weight"] = torch.zeros(128, 128, 3, 3)
    with pytest.raises(ValueError, match="has 128 channels, expected 128 and one for each head"):
        infer_config(masks)
