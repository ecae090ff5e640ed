"""Conditional DETR: DETR with focal loss, reference points, and a decoder that compares positions by themselves."""

from torch import Tensor, nn

from detr.backbone import Backbone
from detr.conditional.transformer import Transformer
from detr.config import ModelConfig
from detr.losses.focal import FIRST_LOGIT
from detr.position import at_least_fp32, build_position, moved_boxes
from detr.transformer import BoxHead
from detr.variant import DETR, SigmoidOutputs, nested


class ConditionalDETR(DETR):
    """Conditional DETR, whose parameters have the original's names."""

    no_object = False

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        channels = config.hidden_dim
        self.transformer = Transformer(config)
        self.class_embed = nn.Linear(channels, num_classes)
        nn.init.constant_(self.class_embed.bias, FIRST_LOGIT)
        self.bbox_embed = BoxHead(channels)
        self.bbox_embed.start_at_zero()
        self.query_embed = nn.Embedding(config.num_queries, channels)
        backbone = Backbone(config)
        self.input_proj = nn.Conv2d(backbone.body.channels, channels, 1)
        self.backbone = nn.ModuleList([backbone, build_position(config)])

    def forward(self, images: Tensor, padding: Tensor | None = None) -> SigmoidOutputs:
        """Return predictions for normalised float images [B, 3, H, W]; B may be 0.

        padding: bool [B, H, W], true where there is no image; None if no image is padded.
        """
        backbone, position = self.backbone
        stages, padding = backbone(images, padding)
        cells = self.input_proj(stages[-1]).flatten(2).transpose(1, 2)
        positions = position(stages[-1], padding)
        padding = None if padding is None else padding.flatten(1)
        vectors, reference = self.transformer(cells, positions, self.query_embed.weight, padding)
        if not self.config.auxiliary:
            vectors = vectors[-1:]
        boxes = moved_boxes(reference, at_least_fp32(self.bbox_embed(vectors)))
        logits = self.class_embed(vectors)
        return nested(list(map(SigmoidOutputs, logits.unbind(), boxes.unbind())))
