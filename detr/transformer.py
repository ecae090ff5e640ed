"""Encoder and decoder of section 3.2 and appendix A.3, and the box head; positions are added to queries and keys in every layer.

Sequences are batch first: [B, cells or queries, channels]. Parameters have the original's names and shapes.

Training on a CPU has a dropout and an attention of its own: with torch's a step of R50 takes 1.2 times as long. One test
compares both branches.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from detr.config import ModelConfig
from detr.dropout import Dropout, keep_mask, keep_probability
from detr.kept import autocast_type, number, run_layer
from detr.position import at_least_fp32

_MANY_SCORES = 1 << 20  # 4 MiB; fewer are not worth computing twice


class Attention(nn.Module):
    """Multi-head attention through `scaled_dot_product_attention`, with `nn.MultiheadAttention`'s parameters."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * config.hidden_dim, config.hidden_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * config.hidden_dim))
        self.out_proj = nn.Linear(config.hidden_dim, config.hidden_dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return [B, Q, C] for a query [B, Q, C], key and value [B, N, C]; the mask [B, 1, 1, N] is true to attend."""
        # Cast once for all projections: autocast keeps casts of parameters, not of slices of them.
        weight, bias = (each.to(autocast_type(each)) for each in (self.in_proj_weight, self.in_proj_bias))
        channels = query.shape[-1]
        if query is key:  # self-attention: one product for both
            rows = [2 * channels, channels]
            qk, value_rows = weight.split(rows)  # type: ignore[no-untyped-call]
            qk_bias, value_bias = bias.split(rows)  # type: ignore[no-untyped-call]
            q, k = self._heads(F.linear(query, qk, qk_bias)).chunk(2, 2)
            v = self._heads(F.linear(value, value_rows, value_bias))
        else:
            q, k, v = (
                self._heads(F.linear(*each))
                for each in zip((query, key, value), weight.chunk(3), bias.chunk(3), strict=True)
            )
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        attended = attend(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.out_proj(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _heads(self, x: Tensor) -> Tensor:
        """Divide the channels of [B, N, channels] among heads of the width of this module's: [B, N, heads, width]."""
        width = self.out_proj.in_features // self.heads
        return x.view(*x.shape[:2], x.shape[2] // width, width)

    def tie(self) -> None:
        """Set the key projection to the query projection, so that equal positions attend to each other at first."""
        query, key, _ = self.in_proj_weight.detach().chunk(3)
        key.copy_(query)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Return softmax(q k^T / sqrt(width)) v, [B, heads, Q, width].

    Training on a CPU does not use its flash kernel, which recomputes the scores in the backward pass: where attention
    saturates (scores of 1e10, as with the random weights of the parity tests), their rounding errors make gradients NaN.
    The plain way keeps the scores three times, so that large ones are recomputed in the backward pass: for the
    400 cells of a ResNet-50 and 640 x 640 pixels, this saves an eighth of a step's memory.
    """
    if q.device.type != "cpu" or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    if q.shape[:3].numel() * k.shape[2] < _MANY_SCORES:
        return _attend_to_few(q, k, v, mask, dropout)
    # Drawn once and kept, a byte per score, so that the backward pass does not draw again.
    keep = keep_mask(torch.Size((*q.shape[:3], k.shape[2])), dropout) if dropout else None
    return checkpoint(_attend_plainly, q, k, v, mask, keep, dropout, use_reentrant=False, preserve_rng_state=False)


def _attend_to_few(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Return what torch's plain kernel does, bit for bit, in fewer operations: it looks for rows without any key.

    A row whose keys are all masked is NaN here and 0 there; an image has at least a cell that is not padding.
    """
    kind = autocast_type(q)
    with torch.autocast("cpu", enabled=False):
        q, k, v = (at_least_fp32(each.to(kind)) for each in (q, k, v))
        factor = number(math.sqrt(1 / math.sqrt(q.shape[-1])), q.dtype)
        scores: Tensor = (q * factor) @ (k * factor).transpose(-2, -1)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return (F.dropout(scores.softmax(-1), dropout) @ v).to(kind)


def _attend_plainly(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, keep: Tensor | None, dropout: float
) -> Tensor:
    scores: Tensor = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights: Tensor = scores.softmax(-1)
    if keep is None:
        return weights @ v
    kept: Tensor = torch.where(keep, weights, 0.0)
    return kept @ (v / keep_probability(dropout))


class Layer(nn.Module):
    """Base of encoder and decoder layers: self-attention, feed-forward, and residuals normalised before or after."""

    def __init__(self, config: ModelConfig, self_attn: nn.Module | None = None) -> None:
        super().__init__()
        self.pre_norm = config.pre_norm
        self.dropout = Dropout(config.dropout)
        self.self_attn = Attention(config) if self_attn is None else self_attn
        self.linear1 = nn.Linear(config.hidden_dim, config.feedforward_dim)
        self.linear2 = nn.Linear(config.feedforward_dim, config.hidden_dim)
        self.norm1 = nn.LayerNorm(config.hidden_dim)
        self.norm2 = nn.LayerNorm(config.hidden_dim)

    def residual(self, x: Tensor, norm: nn.Module, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        if self.pre_norm:
            return x + self.dropout(sublayer(norm(x)))  # type: ignore[no-any-return]
        return norm(x + self.dropout(sublayer(x)))  # type: ignore[no-any-return]

    def attend_self(self, x: Tensor, position: Tensor, mask: Tensor | None = None) -> Tensor:
        positioned = x + position
        return self.self_attn(positioned, positioned, x, mask)  # type: ignore[no-any-return]

    def feed_forward(self, x: Tensor) -> Tensor:
        # Dropout before ReLU gives the same result as after it, and autograd keeps one tensor less.
        return self.linear2(F.relu(self.dropout(self.linear1(x)), inplace=True))  # type: ignore[no-any-return]


class EncoderLayer(Layer):
    """Encoder layer, in which cells attend to cells."""

    def forward(self, x: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        x = self.residual(x, self.norm1, lambda y: self.attend_self(y, position, mask))
        return self.residual(x, self.norm2, self.feed_forward)


class DecoderLayer(Layer):
    """Decoder layer, in which queries attend to queries, then to cells."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.multihead_attn = Attention(config)
        self.norm3 = nn.LayerNorm(config.hidden_dim)

    def forward(
        self, x: Tensor, queries: Tensor, memory: Tensor, positioned_memory: Tensor, mask: Tensor | None
    ) -> Tensor:
        x = self.residual(x, self.norm1, lambda y: self.attend_self(y, queries))
        x = self.residual(x, self.norm2, lambda y: self.multihead_attn(y + queries, positioned_memory, memory, mask))
        return self.residual(x, self.norm3, self.feed_forward)


class Encoder(nn.Module):
    """Stack of encoder layers, and a final normalisation if the layers normalise first."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.norm = nn.LayerNorm(config.hidden_dim) if config.pre_norm else nn.Identity()
        self.recompute = False

    def forward(self, x: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        for layer in self.layers:
            x = run_layer(layer, x, position, mask, recompute=self.recompute)
        return self.norm(x)  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Stack of decoder layers that returns the normalised output of each."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.hidden_dim)

    def forward(self, x: Tensor, queries: Tensor, memory: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        """Return [layers, B, Q, C], the last layer's output last."""
        positioned_memory = memory + position
        outputs = []
        for layer in self.layers:
            x = layer(x, queries, memory, positioned_memory, mask)
            outputs.append(x)
        return self.norm(torch.stack(outputs))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Encoder and decoder with Xavier-uniform initial weights, as in the original."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        if config.tied_attention_init:
            for layer in self.encoder.layers:
                layer.self_attn.tie()  # type: ignore[operator, union-attr]
            for layer in self.decoder.layers:
                layer.multihead_attn.tie()  # type: ignore[operator, union-attr]

    def forward(
        self, cells: Tensor, position: Tensor, queries: Tensor, padding: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the decoder layers' outputs [decoder layers, B, Q, C] and the encoder's [B, N, C].

        cells: [B, N, C]. position: [B or 1, N, C]. queries: [Q, C], the embeddings. padding: [B, N], true = ignore.
        """
        mask = None if padding is None else ~padding[:, None, None, :]
        position = position.to(cells.dtype)
        if self.config.position_at_input:
            cells = cells + position
        memory = self.encoder(cells, position, mask)
        queries = queries.to(cells.dtype).expand(len(cells), -1, -1)
        start = queries if self.config.decoder_input == "queries" else torch.zeros_like(queries)
        return self.decoder(start, queries, memory, position, mask), memory


class BoxHead(nn.Module):
    """Three linear layers whose output's sigmoid is the box."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(channels, outputs) for outputs in (channels, channels, 4))

    def forward(self, x: Tensor) -> Tensor:
        first, second, last = self.layers
        return last(F.relu(second(F.relu(first(x)))))  # type: ignore[no-any-return]

    def start_at_zero(self) -> nn.Linear:
        """Set the last layer to 0, so that the boxes of a variant start at their references; return the layer."""
        last: nn.Linear = self.layers[-1]  # type: ignore[assignment]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        return last
