from dataclasses import replace
from typing import Any

import pytest
import torch

from detr.config import ModelConfig
from detr.model import build_model
from detr.original import load_original_state_dict, to_original_state_dict

SMALL = ModelConfig(
    backbone="resnet18", hidden_dim=32, heads=4, encoder_layers=1, decoder_layers=2, feedforward_dim=64, num_queries=9
)


def test_state_dict_survives_loading_and_saving() -> None:
    source = to_original_state_dict(build_model(SMALL, 4))
    model = build_model(SMALL, 4)
    load_original_state_dict(model, source)
    returned = to_original_state_dict(model)
    assert list(returned) == list(source)
    assert all(torch.equal(returned[key], source[key]) for key in source)


def test_keys_equal_the_originals() -> None:
    keys = to_original_state_dict(build_model(replace(SMALL, position="learned", pre_norm=True), 4))
    for key in (
        "transformer.encoder.layers.0.self_attn.in_proj_weight",
        "transformer.encoder.layers.0.self_attn.out_proj.bias",
        "transformer.encoder.norm.weight",
        "transformer.decoder.layers.1.multihead_attn.in_proj_bias",
        "transformer.decoder.layers.1.norm3.weight",
        "transformer.decoder.norm.bias",
        "class_embed.weight",
        "bbox_embed.layers.2.bias",
        "query_embed.weight",
        "input_proj.weight",
        "backbone.0.body.conv1.weight",
        "backbone.0.body.bn1.running_var",
        "backbone.0.body.layer2.0.downsample.1.running_mean",
        "backbone.1.row_embed.weight",
    ):
        assert key in keys


def test_batch_counters_are_not_saved() -> None:
    config = replace(SMALL, norm="batch")
    state = to_original_state_dict(build_model(config, 4))
    assert not any("num_batches_tracked" in key for key in state)
    load_original_state_dict(
        build_model(SMALL, 4), {**state, "backbone.0.body.bn1.num_batches_tracked": torch.tensor(1)}
    )


@pytest.mark.parametrize(
    ("changes", "classes", "reason"),
    [
        ({}, 5, "another number of classes"),
        ({"num_queries": 10}, 4, "num_queries"),
        ({"position": "learned"}, 4, "learned positions"),
        ({"backbone": "resnet34"}, 4, "another backbone"),
        ({"pre_norm": True}, 4, "normalises first"),
        ({"decoder_layers": 3}, 4, "decoder_layers"),
    ],
)
def test_state_dict_error_explains_the_difference(changes: dict[str, Any], classes: int, reason: str) -> None:
    model = build_model(SMALL, 4)
    before = model.class_embed.weight.clone()
    with pytest.raises(ValueError, match=reason) as error:
        load_original_state_dict(model, to_original_state_dict(build_model(replace(SMALL, **changes), classes)))
    assert "\n" not in str(error.value)
    assert torch.equal(model.class_embed.weight, before)


def test_a_segmentation_state_dict_is_recognised() -> None:
    state = {f"detr.{key}": value for key, value in to_original_state_dict(build_model(SMALL, 4)).items()}
    with pytest.raises(ValueError, match="segmentation model"):
        load_original_state_dict(build_model(SMALL, 4), state)
