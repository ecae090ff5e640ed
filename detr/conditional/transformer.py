"""Decoder of Conditional DETR; its encoder is DETR's.

Each query has a reference point. In cross-attention, content and position are side by side instead of added: half of the
width of each head compares contents, the other half compares the sine vector of the reference point, scaled by what the
query has learned so far, with the positions of the cells. Only the first layer adds positions to contents as well.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detr.config import ModelConfig
from detr.position import at_least_fp32, sine_vectors
from detr.transformer import Encoder, Layer, attend

_TEMPERATURE = 10000.0  # of the sine vectors of reference points, whatever that of the cells' positions


class Decoded(NamedTuple):
    """Normalised output [layers, B, Q, C] of each decoder layer, and the queries' reference points (x, y), [Q, 2]."""

    vectors: Tensor
    reference: Tensor


class TwoLayers(nn.Module):
    """Two linear layers with a ReLU between them."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(channels, channels), nn.Linear(channels, outputs)])

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layers
        return second(F.relu(first(x)))  # type: ignore[no-any-return]


class ProjectedAttention(nn.Module):
    """Multi-head attention of queries, keys and values that are projected already."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.out_proj = nn.Linear(config.hidden_dim, config.hidden_dim)
        nn.init.zeros_(self.out_proj.bias)

    def split(self, x: Tensor) -> Tensor:
        """Return [B, heads, N, width] for [B, N, heads * width]."""
        return x.view(*x.shape[:2], self.heads, x.shape[-1] // self.heads).transpose(1, 2)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return [B, Q, C] for tensors that `split` returned; the mask [B, 1, 1, N] is true to attend."""
        attended = attend(query, key, value, mask, self.dropout if self.training else 0.0)
        return self.out_proj(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class DecoderLayer(Layer):
    """Decoder layer, in which queries attend to queries, then to cells by content and by position."""

    def __init__(self, config: ModelConfig, *, first: bool) -> None:
        super().__init__(config, ProjectedAttention(config))
        channels = config.hidden_dim
        self.sa_qcontent_proj = nn.Linear(channels, channels)
        self.sa_qpos_proj = nn.Linear(channels, channels)
        self.sa_kcontent_proj = nn.Linear(channels, channels)
        self.sa_kpos_proj = nn.Linear(channels, channels)
        self.sa_v_proj = nn.Linear(channels, channels)
        self.ca_qcontent_proj = nn.Linear(channels, channels)
        self.ca_qpos_proj = nn.Linear(channels, channels) if first else None
        self.ca_kcontent_proj = nn.Linear(channels, channels)
        self.ca_kpos_proj = nn.Linear(channels, channels)
        self.ca_v_proj = nn.Linear(channels, channels)
        self.ca_qpos_sine_proj = nn.Linear(channels, channels)
        self.cross_attn = ProjectedAttention(config)
        self.norm3 = nn.LayerNorm(channels)

    def forward(
        self, x: Tensor, queries: Tensor, sines: Tensor, memory: Tensor, position: Tensor, mask: Tensor | None
    ) -> Tensor:
        x = self.residual(x, self.norm1, lambda y: self._attend_queries(y, queries))
        x = self.residual(x, self.norm2, lambda y: self._attend_cells(y, queries, sines, memory, position, mask))
        return self.residual(x, self.norm3, self.feed_forward)

    def _attend_queries(self, x: Tensor, queries: Tensor) -> Tensor:
        attention: ProjectedAttention = self.self_attn  # type: ignore[assignment]
        query = self.sa_qcontent_proj(x) + self.sa_qpos_proj(queries)
        key = self.sa_kcontent_proj(x) + self.sa_kpos_proj(queries)
        return attention(*map(attention.split, (query, key, self.sa_v_proj(x))))  # type: ignore[no-any-return]

    def _attend_cells(
        self, x: Tensor, queries: Tensor, sines: Tensor, memory: Tensor, position: Tensor, mask: Tensor | None
    ) -> Tensor:
        split = self.cross_attn.split
        query, key = self.ca_qcontent_proj(x), self.ca_kcontent_proj(memory)
        key_position = self.ca_kpos_proj(position)
        if self.ca_qpos_proj is not None:
            query, key = query + self.ca_qpos_proj(queries), key + key_position
        query = torch.cat([split(query), split(self.ca_qpos_sine_proj(sines))], -1)
        key = split(key)
        key = torch.cat([key, split(key_position).expand_as(key)], -1)
        return self.cross_attn(query, key, split(self.ca_v_proj(memory)), mask)  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Stack of decoder layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels = config.hidden_dim
        self.channels = channels
        self.layers = nn.ModuleList(DecoderLayer(config, first=i == 0) for i in range(config.decoder_layers))
        self.norm = nn.LayerNorm(channels)
        self.query_scale = TwoLayers(channels, channels)
        self.ref_point_head = TwoLayers(channels, 2)

    def forward(self, queries: Tensor, memory: Tensor, position: Tensor, mask: Tensor | None) -> Decoded:
        """Return the output of each layer for the embeddings of the queries, [Q, C]."""
        reference = at_least_fp32(self.ref_point_head(queries)).sigmoid()
        sines = sine_vectors(reference[:, 1], reference[:, 0], self.channels, _TEMPERATURE).to(queries.dtype)
        queries = queries.to(memory.dtype).expand(len(memory), -1, -1)
        x = torch.zeros_like(queries)
        outputs = []
        for number, layer in enumerate(self.layers):
            scaled = self.query_scale(x) * sines if number else sines.expand_as(queries)
            x = layer(x, queries, scaled, memory, position, mask)
            outputs.append(self.norm(x))
        return Decoded(torch.stack(outputs), reference)


class Transformer(nn.Module):
    """Encoder and decoder with Xavier-uniform initial weights, as in the original."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, cells: Tensor, position: Tensor, queries: Tensor, padding: Tensor | None) -> Decoded:
        """Return what the decoder does.

        cells: [B, N, C]. position: [B or 1, N, C]. queries: [Q, C], the embeddings. padding: [B, N], true = ignore.
        """
        mask = None if padding is None else ~padding[:, None, None, :]
        position = position.to(cells.dtype)
        return self.decoder(queries, self.encoder(cells, position, mask), position, mask)  # type: ignore[no-any-return]
