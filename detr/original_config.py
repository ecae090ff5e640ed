"""Configuration of a model in the original's format, from the names and shapes of its tensors.

Two settings do not show in the tensors and are arguments: the dilation of the last stage and, without a mask head, the
number of attention heads.
"""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from detr.config import ModelConfig

_Backbone = Literal["resnet18", "resnet34", "resnet50", "resnet101"]
# Key: number of blocks of each stage, and true if a block has a third convolution.
_BACKBONES: dict[tuple[tuple[int, ...], bool], _Backbone] = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
}
_DETECTOR = "detr."  # prefix of the detector in the original's segmentation model
PAPERS_HEADS = 8


def infer_config(
    state_dict: Mapping[str, Tensor], *, heads: int | None = None, dilation: bool = False, **chosen: Any
) -> tuple[ModelConfig, int]:
    """Return the configuration and the number of classes (without "no object") of the model with these tensors.

    heads: None takes the number that the mask head shows, or the paper's 8 without a mask head. chosen: other fields
    that no tensor shows (`dropout`).
    Raise `ValueError` naming the first tensor that is missing or of an impossible shape, and `ConfigError` if the
    configuration is impossible. Other differences are found when the state dict is loaded.
    """
    masks = any(key.startswith("mask_head.") for key in state_dict)
    detector = {key.removeprefix(_DETECTOR) if masks else key: value for key, value in state_dict.items()}
    queries, hidden_dim = shape_of(detector, "query_embed.weight", 2)
    classes = shape_of(detector, "class_embed.weight", 2)[0] - 1
    if classes < 1:
        raise ValueError(f"class_embed.weight has {classes + 1} rows, expected a class and 'no object' at least")
    shown = heads_of_mask_head(state_dict)
    config = ModelConfig(
        **common_fields(detector),
        dilation=dilation,
        hidden_dim=hidden_dim,
        heads=heads or shown or PAPERS_HEADS,
        num_queries=queries,
        pre_norm="transformer.encoder.norm.weight" in detector,
        masks=masks,
        **chosen,
    )
    return config, classes


def common_fields(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the fields of the configuration that tensors of the same names show in every variant."""
    return {
        "backbone": backbone_of(state_dict),
        "position": "learned" if "backbone.1.row_embed.weight" in state_dict else "sine",
        "encoder_layers": count_of(state_dict, "transformer.encoder.layers."),
        "decoder_layers": count_of(state_dict, "transformer.decoder.layers."),
        "feedforward_dim": shape_of(state_dict, "transformer.decoder.layers.0.linear1.weight", 2)[0],
    }


def heads_of_mask_head(state_dict: Mapping[str, Tensor]) -> int | None:
    """Return the number of attention heads, for each of which the mask head has an input channel; None without masks.

    Raise `ValueError` if the number of channels contradicts the model's width.
    """
    if "mask_head.lay1.weight" not in state_dict:
        return None
    channels = shape_of(state_dict, "mask_head.lay1.weight", 4)[0]
    hidden_dim = shape_of(state_dict, f"{_DETECTOR}query_embed.weight", 2)[1]
    if channels <= hidden_dim:
        raise ValueError(f"mask_head.lay1.weight has {channels} channels, expected {hidden_dim} and one for each head")
    return channels - hidden_dim


def backbone_of(state_dict: Mapping[str, Tensor]) -> _Backbone:
    """Return the backbone whose blocks the tensors show."""
    body = "backbone.0.body."
    shape_of(state_dict, f"{body}conv1.weight", 4)
    blocks = tuple(count_of(state_dict, f"{body}layer{stage}.") for stage in (1, 2, 3, 4))
    kind = (blocks, f"{body}layer1.0.conv3.weight" in state_dict)
    if kind not in _BACKBONES:
        stages = ", ".join(map(str, blocks))
        raise ValueError(f"its backbone has stages of {stages} blocks, expected a ResNet-18, -34, -50 or -101")
    return _BACKBONES[kind]


def count_of(state_dict: Mapping[str, Tensor], prefix: str) -> int:
    """Return the number of numbered modules with this prefix."""
    return len({key.removeprefix(prefix).split(".")[0] for key in state_dict if key.startswith(prefix)})


def shape_of(state_dict: Mapping[str, Tensor], key: str, dimensions: int) -> tuple[int, ...]:
    """Return the shape of a tensor; raise `ValueError` if it is missing or has another number of dimensions."""
    if key not in state_dict:
        raise ValueError(f"it holds no {key}, expected a DETR's state dict")
    shape = tuple(state_dict[key].shape)
    if len(shape) != dimensions:
        raise ValueError(f"{key} has {len(shape)} dimensions, expected {dimensions}")
    return shape
