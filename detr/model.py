"""DETR: a backbone, a transformer, and heads that predict a class, a box and, if configured, a mask per query."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from detr.backbone import Backbone, FrozenBatchNorm
from detr.conditional.model import ConditionalDETR
from detr.config import ConfigError, ModelConfig
from detr.deformable.model import DeformableDETR
from detr.mask_head import MASK_MODULES, AttentionMap, MaskHead
from detr.position import build_position, sine_vectors
from detr.transformer import BoxHead, Transformer
from detr.variant import DETR as DETR
from detr.variant import Outputs as Outputs


class PlainDETR(DETR):
    """DETR of the paper."""

    no_object = True

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        channels = config.hidden_dim
        # The names and the order of modules are the original's, so that its state dicts load unchanged.
        self.transformer = Transformer(config)
        self.class_embed = nn.Linear(channels, num_classes + 1)
        self.bbox_embed = BoxHead(channels)
        self.query_embed = nn.Embedding(config.num_queries, channels)
        backbone = Backbone(config)
        self.input_proj = nn.Conv2d(backbone.body.channels, channels, 1)
        self.backbone = nn.ModuleList([backbone, build_position(config)])
        if config.query_init == "grid":
            self.query_embed.weight.detach().copy_(_grid(config))
        if config.masks:
            # Built last, so that a seed gives the detector the same initial weights with and without masks.
            self.bbox_attention = AttentionMap(channels, config.heads)
            self.mask_head = MaskHead(channels, config.heads, backbone.body.stage_channels[2::-1])

    def forward(self, images: Tensor, padding: Tensor | None = None) -> Outputs:
        """Return predictions for normalised float images [B, 3, H, W]; B may be 0.

        padding: bool [B, H, W], true where there is no image; None if no image is padded.
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
        # Boxes stay in fp32 under autocast: bf16 has 8 bits, so it distinguishes only 256 positions along an image.
        boxes = self.bbox_embed(decoded).float().sigmoid()
        *auxiliary, last = map(Outputs, logits.unbind(), boxes.unbind())
        masks = None
        if self.config.masks:
            attention = self.bbox_attention(decoded[-1], memory, padding).unflatten(-1, features.shape[-2:])
            masks = self.mask_head(features, attention, stages[2::-1])
        # `last._replace` would be shorter, but torch 2.11 cannot compile it.
        return Outputs(last.logits, last.boxes, tuple(auxiliary), masks)


_VARIANTS: dict[str, Callable[[ModelConfig, int], DETR]] = {
    "detr": PlainDETR,
    "deformable": DeformableDETR,
    "conditional": ConditionalDETR,
}


def build_model(config: ModelConfig, num_classes: int) -> DETR:
    """Build the configured variant with random weights for labels 0 to num_classes - 1; nothing is downloaded.

    `load_backbone_weights` and `load_original_state_dict` load pre-trained weights. Raise `ConfigError` for less than
    one class.
    """
    if num_classes < 1:
        raise ConfigError(f"num_classes: got {num_classes}, expected at least 1; take it from the manifest")
    return _VARIANTS[config.variant](config, num_classes)


def freeze_detector(model: DETR) -> None:
    """Let only the mask head train, as the original's `--frozen_weights` does (section 4.4).

    No parameter of the detector gets a gradient, whatever the losses, and trainable batch norm becomes frozen. As in the
    original, `model.train()` still turns on the detector's dropout, so that the head learns from the same features as in
    joint training. Call it before the optimizer is built and before the model is wrapped. Raise `ConfigError` for a
    model without a mask head.
    """
    if not model.config.masks:
        raise ConfigError("masks: got a model without a mask head, expected one to train; build it with masks=True")
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                frozen = FrozenBatchNorm(child.num_features).to(child.weight.device)
                frozen.load_state_dict({key: child.state_dict()[key] for key in frozen.state_dict()})
                setattr(module, name, frozen)
    for name, parameter in model.named_parameters():
        if not name.startswith(MASK_MODULES):
            parameter.requires_grad_(False)


def _grid(config: ModelConfig) -> Tensor:
    """Return the sine vectors [Q, C] of the centres of a sqrt(Q) x sqrt(Q) grid over the image."""
    side = math.isqrt(config.num_queries)
    centres = (torch.arange(side) + 0.5) / side
    rows, columns = torch.meshgrid(centres, centres, indexing="ij")
    return sine_vectors(rows, columns, config.hidden_dim, config.position_temperature).flatten(0, 1)
