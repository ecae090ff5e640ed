"""Which model a state dict of the original's belongs to, read off the names and shapes of its tensors.

What leaves no trace in the tensors is asked for: whether the last stage is dilated and, where there is no mask head, the
number of attention heads.
"""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from detr.config import ModelConfig

_Backbone = Literal["resnet18", "resnet34", "resnet50", "resnet101"]
# Blocks per stage, and whether a block has a third convolution.
_BACKBONES: dict[tuple[tuple[int, ...], bool], _Backbone] = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
}
_DETECTOR = "detr."  # what the original's segmentation model calls its detector
_PAPERS_HEADS = 8


def recognise(
    state_dict: Mapping[str, Tensor], *, heads: int | None = None, dilation: bool = False, **chosen: Any
) -> tuple[ModelConfig, int]:
    """Return the configuration and the number of classes (without "no object") of the model that has these tensors.

    heads: None for what a mask head shows, else the paper's 8. chosen: other fields that no tensor shows (`dropout`).
    Raises ValueError naming the first tensor that is missing or of an impossible shape, and `ConfigError` where the
    parts cannot make a model. Loading is what finds every other difference.
    """
    masks = any(key.startswith("mask_head.") for key in state_dict)
    detector = {key.removeprefix(_DETECTOR) if masks else key: value for key, value in state_dict.items()}
    queries, hidden_dim = _shape(detector, "query_embed.weight", 2)
    classes = _shape(detector, "class_embed.weight", 2)[0] - 1
    if classes < 1:
        raise ValueError(f"class_embed.weight has {classes + 1} rows, expected a class and 'no object' at least")
    shown = heads_of_mask_head(state_dict)
    config = ModelConfig(
        backbone=_backbone(detector),
        dilation=dilation,
        position="learned" if "backbone.1.row_embed.weight" in detector else "sine",
        hidden_dim=hidden_dim,
        heads=heads or shown or _PAPERS_HEADS,
        encoder_layers=_count(detector, "transformer.encoder.layers."),
        decoder_layers=_count(detector, "transformer.decoder.layers."),
        feedforward_dim=_shape(detector, "transformer.decoder.layers.0.linear1.weight", 2)[0],
        num_queries=queries,
        pre_norm="transformer.encoder.norm.weight" in detector,
        masks=masks,
        **chosen,
    )
    return config, classes


def heads_of_mask_head(state_dict: Mapping[str, Tensor]) -> int | None:
    """The number of attention heads as the mask head shows it, whose input has one channel for each; None without one.

    Raises ValueError where it contradicts the model's width.
    """
    if "mask_head.lay1.weight" not in state_dict:
        return None
    channels = _shape(state_dict, "mask_head.lay1.weight", 4)[0]
    hidden_dim = _shape(state_dict, f"{_DETECTOR}query_embed.weight", 2)[1]
    if channels <= hidden_dim:
        raise ValueError(f"mask_head.lay1.weight has {channels} channels, expected {hidden_dim} and one for each head")
    return channels - hidden_dim


def _backbone(state_dict: Mapping[str, Tensor]) -> _Backbone:
    body = "backbone.0.body."
    _shape(state_dict, f"{body}conv1.weight", 4)
    blocks = tuple(_count(state_dict, f"{body}layer{stage}.") for stage in (1, 2, 3, 4))
    kind = (blocks, f"{body}layer1.0.conv3.weight" in state_dict)
    if kind not in _BACKBONES:
        stages = ", ".join(map(str, blocks))
        raise ValueError(f"its backbone has stages of {stages} blocks, expected a ResNet-18, -34, -50 or -101")
    return _BACKBONES[kind]


def _count(state_dict: Mapping[str, Tensor], prefix: str) -> int:
    """How many modules are numbered after this prefix."""
    return len({key.removeprefix(prefix).split(".")[0] for key in state_dict if key.startswith(prefix)})


def _shape(state_dict: Mapping[str, Tensor], key: str, dimensions: int) -> tuple[int, ...]:
    if key not in state_dict:
        raise ValueError(f"it holds no {key}, expected a DETR's state dict")
    shape = tuple(state_dict[key].shape)
    if len(shape) != dimensions:
        raise ValueError(f"{key} has {len(shape)} dimensions, expected {dimensions}")
    return shape
