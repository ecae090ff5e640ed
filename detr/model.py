"""DETR: a backbone, a transformer, and heads that read a class, a box and, if configured, a mask off each query."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detr.backbone import Backbone
from detr.config import ConfigError, ModelConfig
from detr.position import LearnedPosition, SinePosition, sine_vectors
from detr.segmentation import AttentionMap, MaskHead
from detr.transformer import Transformer


class Outputs(NamedTuple):
    """The predictions of one decoder layer; a named tuple, so that DDP, FSDP and compile see through it.

    logits: [B, Q, K + 1], the last class is "no object". boxes: [B, Q, 4] cxcywh in 0 to 1 of the image.
    auxiliary: the predictions of the decoder layers before the last, first to last; empty if not configured.
    masks: logits [B, Q, h, w] of each query's mask on the backbone's stride-4 grid over the canvas; None without a
    mask head, and in `auxiliary`.
    """

    logits: Tensor
    boxes: Tensor
    auxiliary: tuple["Outputs", ...] = ()
    masks: Tensor | None = None


class BoxHead(nn.Module):
    """Three linear layers; the box is the sigmoid of what they return."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(channels, outputs) for outputs in (channels, channels, 4))

    def forward(self, x: Tensor) -> Tensor:
        first, second, last = self.layers
        return last(F.relu(second(F.relu(first(x)))))  # type: ignore[no-any-return]


class DETR(nn.Module):
    """The detector. Build it with `build_model`."""

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        channels = config.hidden_dim
        self.config = config
        self.num_classes = num_classes
        # Modules are named and ordered as the original's, whose state dicts therefore load as they are.
        self.transformer = Transformer(config)
        self.class_embed = nn.Linear(channels, num_classes + 1)
        self.bbox_embed = BoxHead(channels)
        self.query_embed = nn.Embedding(config.num_queries, channels)
        backbone = Backbone(config)
        self.input_proj = nn.Conv2d(backbone.body.channels, channels, 1)
        sine = config.position == "sine"
        position = SinePosition(channels, config.position_temperature) if sine else LearnedPosition(channels)
        self.backbone = nn.ModuleList([backbone, position])
        if config.query_init == "grid":
            self.query_embed.weight.detach().copy_(_grid(config))
        if config.masks:
            # Last, so that a seed gives the detector the same first weights with and without them.
            self.bbox_attention = AttentionMap(channels, config.heads)
            self.mask_head = MaskHead(channels, config.heads, backbone.body.stage_channels[2::-1])

    def forward(self, images: Tensor, padding: Tensor | None = None) -> Outputs:
        """Detect in normalised float images [B, 3, H, W]; padding is bool [B, H, W], true = pad, None = none anywhere.

        B may be 0.
        """
        backbone, position = self.backbone
        stages, padding = backbone(images, padding)
        features = self.input_proj(stages[-1])
        cells = features.flatten(2).transpose(1, 2)
        positions = position(stages[-1], padding)
        padding = None if padding is None else padding.flatten(1)
        decoded, memory = self.transformer(cells, positions, self.query_embed.weight, padding)
        if not self.config.auxiliary:
            decoded = decoded[-1:]
        logits = self.class_embed(decoded)
        # Boxes stay in fp32 under autocast: bf16 tells 256 places apart along an image.
        boxes = self.bbox_embed(decoded).float().sigmoid()
        *auxiliary, last = map(Outputs, logits.unbind(), boxes.unbind())
        masks = None
        if self.config.masks:
            attention = self.bbox_attention(decoded[-1], memory, padding).unflatten(-1, features.shape[-2:])
            masks = self.mask_head(features, attention, stages[2::-1])
        # Not `_replace`, which torch 2.11 cannot compile.
        return Outputs(last.logits, last.boxes, tuple(auxiliary), masks)


def build_model(config: ModelConfig, num_classes: int) -> DETR:
    """Build a DETR with random weights for labels 0 to num_classes - 1. Nothing is downloaded.

    Pre-trained weights come in through `load_backbone_weights` or `load_original_state_dict`.
    """
    if num_classes < 1:
        raise ConfigError(f"num_classes: got {num_classes}, expected at least 1; take it from the manifest")
    return DETR(config, num_classes)


def _grid(config: ModelConfig) -> Tensor:
    """Return the sine vectors [Q, C] of the centres of a sqrt(Q) x sqrt(Q) grid over the image."""
    side = math.isqrt(config.num_queries)
    centres = (torch.arange(side) + 0.5) / side
    rows, columns = torch.meshgrid(centres, centres, indexing="ij")
    return sine_vectors(rows, columns, config.hidden_dim, config.position_temperature).flatten(0, 1)
