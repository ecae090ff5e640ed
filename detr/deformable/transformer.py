"""Encoder and decoder of Deformable DETR, with the original's names: in the decoder, `norm2` comes before `norm1`."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detr.config import ModelConfig
from detr.deformable.attention import DeformableAttention, Shapes
from detr.deformable.levels import Geometry
from detr.deformable.proposals import best_cells, box_vectors, cell_boxes
from detr.kept import run_layer
from detr.position import at_least_fp32, moved_boxes
from detr.transformer import Layer
from detr.variant import SigmoidOutputs


class Queries(NamedTuple):
    """First state of the queries: position and content [B, Q, C]; reference [B, Q, 2 or 4], fractions of the image."""

    position: Tensor
    content: Tensor
    reference: Tensor


class DecodedLayer(NamedTuple):
    """Output of a decoder layer: vectors [B, Q, C] and boxes [B, Q, 4] cxcywh, fractions of the image."""

    vectors: Tensor
    boxes: Tensor


class EncoderLayer(Layer):
    """Encoder layer, in which each cell reads a few points around itself in every level."""

    def __init__(self, config: ModelConfig) -> None:
        points = config.deformable.encoder_points
        super().__init__(config, DeformableAttention(config.hidden_dim, config.heads, config.deformable.levels, points))

    def forward(self, x: Tensor, position: Tensor, reference: Tensor, padding: Tensor | None, shapes: Shapes) -> Tensor:
        x = self.residual(x, self.norm1, lambda y: self.self_attn(y + position, reference, y, padding, shapes))
        return self.residual(x, self.norm2, self.feed_forward)


class DecoderLayer(Layer):
    """Decoder layer, in which queries attend to queries, then read a few points of every level."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        options = config.deformable
        self.cross_attn = DeformableAttention(config.hidden_dim, config.heads, options.levels, options.decoder_points)
        self.norm3 = nn.LayerNorm(config.hidden_dim)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        reference: Tensor,
        memory: Tensor,
        padding: Tensor | None,
        shapes: Shapes,
        mask: Tensor | None,
    ) -> Tensor:
        x = self.residual(x, self.norm2, lambda y: self.attend_self(y, position, mask))
        x = self.residual(x, self.norm1, lambda y: self.cross_attn(y + position, reference, memory, padding, shapes))
        return self.residual(x, self.norm3, self.feed_forward)


class Encoder(nn.Module):
    """Stack of encoder layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.recompute = False

    def forward(self, x: Tensor, position: Tensor, geometry: Geometry) -> Tensor:
        """Return [B, S, C] for cells [B, S, C] and their positions [B or 1, S, C]."""
        reference = geometry.centres[:, :, None] * geometry.valid_ratios[:, None]
        inputs = (position, reference, geometry.padding, geometry.shapes)
        for layer in self.layers:
            x = run_layer(layer, x, *inputs, recompute=self.recompute)
        return x


class Decoder(nn.Module):
    """Stack of decoder layers, each of which predicts boxes.

    refine: a layer's boxes are the references of the next, without their gradient. look_forward_twice: that gradient
    is kept for the next layer's boxes, but not for the points that it samples.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.refine = config.deformable.box_refine
        self.look_forward_twice = config.deformable.look_forward_twice

    def forward(
        self,
        queries: Queries,
        memory: Tensor,
        geometry: Geometry,
        box_heads: Sequence[nn.Module],
        mask: Tensor | None = None,
    ) -> list[DecodedLayer]:
        """Return the output of each layer; `box_heads` are one per layer, mask [1, 1, Q, Q] is true to attend."""
        position, x, reference = queries
        kept = reference  # the reference with the gradient of the boxes that come from it
        decoded = []
        for layer, head in zip(self.layers, box_heads, strict=True):
            ratios = geometry.valid_ratios.repeat(1, 1, reference.shape[-1] // 2)
            points = reference[:, :, None] * ratios[:, None]
            x = layer(x, position, points, memory, geometry.padding, geometry.shapes, mask)
            change = at_least_fp32(head(x))
            decoded.append(DecodedLayer(x, moved_boxes(kept, change)))
            if self.refine:
                kept = moved_boxes(reference, change) if self.look_forward_twice else decoded[-1].boxes.detach()
                reference = decoded[-1].boxes.detach()
        return decoded


class Transformer(nn.Module):
    """Encoder, decoder and the first state of the queries, with the original's initial weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels, two_stage = config.hidden_dim, config.deformable.two_stage
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.level_embed = nn.Parameter(torch.empty(config.deformable.levels, channels))
        if two_stage:
            self.enc_output = nn.Linear(channels, channels)
            self.enc_output_norm = nn.LayerNorm(channels)
            self.pos_trans = nn.Linear(2 * channels, 2 * channels)
            self.pos_trans_norm = nn.LayerNorm(2 * channels)
        else:
            self.reference_points = nn.Linear(channels, 2)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()
        if not two_stage:
            nn.init.zeros_(self.reference_points.bias)
        nn.init.normal_(self.level_embed)

    def learned_queries(self, embeddings: Tensor, batch: int) -> Queries:
        """Return the queries of embeddings [Q, 2 C], whose first half is the position and the second the content."""
        position, content = (half.expand(batch, -1, -1) for half in embeddings.chunk(2, -1))
        return Queries(position, content, at_least_fp32(self.reference_points(position)).sigmoid())

    def proposed_queries(
        self,
        memory: Tensor,
        geometry: Geometry,
        class_head: nn.Module,
        box_head: nn.Module,
        count: int,
        content: Tensor | None,
    ) -> tuple[Queries, SigmoidOutputs | None]:
        """Return the queries of the best cells, and in training the predictions for all cells.

        Cells are ranked by class 0, which means "an object" here. content: [Q, C], learned, in order of rank; None
        makes it from the boxes too.
        """
        batch = memory.shape[0]
        starts, invalid = cell_boxes(geometry)
        vectors = self.enc_output_norm(self.enc_output(memory.masked_fill(invalid[..., None], 0.0)))
        logits = class_head(vectors)
        best = best_cells(logits.detach()[..., 0].expand(batch, -1), count)
        starts = starts.expand(batch, -1, -1)
        changes = at_least_fp32(box_head(_taken(vectors.detach(), best)))
        reference = (changes.detach() + _taken(starts, best)).sigmoid()
        of_boxes = self.pos_trans_norm(self.pos_trans(box_vectors(reference, memory.shape[-1]).to(memory.dtype)))
        position, second = of_boxes.chunk(2, -1)
        content = second if content is None else content[: best.shape[1]].expand(batch, -1, -1)
        outputs = None
        if self.training:
            outputs = SigmoidOutputs(logits, (at_least_fp32(box_head(vectors)) + starts).sigmoid())
        return Queries(position, content, reference), outputs


def _taken(values: Tensor, cells: Tensor) -> Tensor:
    """Return the rows [B, Q, ...] of values [B, S, ...] at cells [B, Q]."""
    return values.gather(1, cells[..., None].expand(-1, -1, values.shape[-1]))
