"""Deformable DETR: features of several levels, deformable attention, and a box that each decoder layer may refine.

Options: iterative refinement and the second stage of its paper; hybrid matching and two of the "tricks" of H-DETR (the
third is dropout 0). Parameters have the original's names. The original holds some under several names, `aliases` here.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from detr.backbone import Backbone
from detr.config import ModelConfig
from detr.deformable.levels import LevelProjections, geometry, level_padding
from detr.deformable.transformer import DecodedLayer, Transformer
from detr.losses.focal import FIRST_LOGIT
from detr.position import build_position
from detr.transformer import BoxHead
from detr.variant import DETR, SigmoidOutputs, nested

_SIDE_BEFORE_SIGMOID = -2.0  # of the first layer's boxes: width and height of 0.12


class DeformableDETR(DETR):
    """Deformable DETR, with `num_queries` queries, and further ones in training with hybrid matching."""

    no_object = False

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        channels, options = config.hidden_dim, config.deformable
        self.transformer = Transformer(config)
        # One pair of heads per layer with refinement, another for the second stage, else a single pair.
        heads = (config.decoder_layers if options.box_refine else 1) + options.two_stage
        self.class_embed = nn.ModuleList(nn.Linear(channels, num_classes) for _ in range(heads))
        self.bbox_embed = nn.ModuleList(BoxHead(channels) for _ in range(heads))
        self.proposal_head = f"class_embed.{heads - 1}." if options.two_stage else ""
        self._start_heads()
        queries = config.num_queries + options.one_to_many_queries
        if options.mixed_selection or not options.two_stage:
            self.query_embed = nn.Embedding(queries, channels if options.two_stage else 2 * channels)
        backbone = Backbone(config)
        self.input_proj = LevelProjections(config, backbone.body)
        self.backbone = nn.ModuleList([backbone, build_position(config, back=0.5)])

    def forward(self, images: Tensor, padding: Tensor | None = None) -> SigmoidOutputs:
        """Return predictions for normalised float images [B, 3, H, W]; B may be 0.

        padding: bool [B, H, W], true where there is no image; None if no image is padded. Raise `ConfigError` if a
        model with two stages gets images of fewer cells than queries.
        """
        options, many = self.config.deformable, self.training and self.config.deformable.one_to_many_queries
        features = self.input_proj(self.backbone[0].body.stage_outputs(images))  # type: ignore[union-attr, operator]
        paddings = [level_padding(padding, level.shape[-2:]) for level in features]
        shapes = tuple((level.shape[2], level.shape[3]) for level in features)
        places = geometry(shapes, paddings, torch.empty(0, dtype=self._wide(), device=images.device))
        cells = torch.cat([level.flatten(2).transpose(1, 2) for level in features], 1)
        positions = [
            self.backbone[1](level, padded).to(cells.dtype) + vector
            for level, padded, vector in zip(features, paddings, self.transformer.level_embed, strict=True)
        ]
        memory = self.transformer.encoder(cells, torch.cat(positions, 1), places)
        count = self.config.num_queries + many
        encoder = None
        if options.two_stage:
            content = self.query_embed.weight if options.mixed_selection else None
            heads = self.class_embed[-1], self.bbox_embed[-1]
            queries, encoder = self.transformer.proposed_queries(memory, places, *heads, count, content)
        else:
            queries = self.transformer.learned_queries(self.query_embed.weight[:count], images.shape[0])
        layers = self.config.decoder_layers
        box_heads = list(self.bbox_embed[:layers]) if options.box_refine else [self.bbox_embed[0]] * layers
        mask = self._mask(count, images.device) if many else None
        decoded = self.transformer.decoder(queries, memory, places, box_heads, mask)
        if not (self.config.auxiliary or self.training):
            decoded, box_heads = decoded[-1:], box_heads[-1:]
        return self._outputs(decoded, encoder)

    def aliases(self) -> Mapping[str, str]:
        """Return the original's further names of the heads, which also hold them in the decoder."""
        own = [name for name, _ in self.named_parameters() if name.startswith(("class_embed.", "bbox_embed."))]
        if not self.config.deformable.box_refine:
            numbers = range(1, self.config.decoder_layers)
            return {name.replace(".0.", f".{number}.", 1): name for number in numbers for name in own}
        in_decoder = ("class_embed.", "bbox_embed.") if self.config.deformable.two_stage else ("bbox_embed.",)
        return {f"transformer.decoder.{name}": name for name in own if name.startswith(in_decoder)}

    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.transformer.level_embed.dtype, torch.float32)

    def _mask(self, count: int, device: torch.device) -> Tensor:
        """Return [1, 1, Q, Q], true where a query may attend to another: inside its group only."""
        shared = torch.arange(count, device=device) >= self.config.num_queries
        return (shared[:, None] == shared)[None, None]

    def _outputs(self, decoded: list[DecodedLayer], encoder: SigmoidOutputs | None) -> SigmoidOutputs:
        refine, first = self.config.deformable.box_refine, self.config.decoder_layers - len(decoded)
        predicted = [
            SigmoidOutputs(self.class_embed[first + number if refine else 0](layer.vectors), layer.boxes)
            for number, layer in enumerate(decoded)
        ]
        own, many = self.config.num_queries, None
        if predicted[0].boxes.shape[1] > own:
            many = nested([SigmoidOutputs(layer.logits[:, own:], layer.boxes[:, own:]) for layer in predicted])
        one_to_one = [SigmoidOutputs(layer.logits[:, :own], layer.boxes[:, :own]) for layer in predicted]
        last = nested(one_to_one)
        return SigmoidOutputs(last.logits, last.boxes, last.auxiliary, None, encoder, many)

    @torch.no_grad()
    def _start_heads(self) -> None:
        """Set the original's first weights: heads start equal, and every class is unlikely."""
        for linear in self.class_embed:
            linear.load_state_dict(self.class_embed[0].state_dict())
            nn.init.constant_(linear.bias, FIRST_LOGIT)  # type: ignore[arg-type]
        for number, head in enumerate(self.bbox_embed):
            head.load_state_dict(self.bbox_embed[0].state_dict())
            last = head.start_at_zero()  # type: ignore[operator]
            if number == 0 and not self.config.deformable.two_stage:
                last.bias[2:] = _SIDE_BEFORE_SIGMOID
