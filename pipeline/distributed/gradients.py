"""Gradients of a model in one buffer, for passes that do not go through DDP.

A captured backward pass must add to gradients that never move, and ranks that replay graphs, while others do not, must agree
on their collectives. So gradients are added up here, and averaged by one reduction after the last pass of a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from pipeline.distributed.ranks import Ranks


class Gradients:
    """Buffer of the gradients of all trained parameters, each with the layout of its parameter."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.buffer = torch.zeros(
            sum(parameter.numel() for parameter in self.parameters),
            dtype=torch.float32,
            device=self.parameters[0].device,
        )
        pieces = torch.split(self.buffer, [parameter.numel() for parameter in self.parameters])
        self._views = [
            piece.as_strided(parameter.shape, parameter.stride(), piece.storage_offset())
            for piece, parameter in zip(pieces, self.parameters, strict=True)
        ]
        self._reached: set[int] = set()

    def clear(self) -> None:
        """Set all gradients to zero, at the start of a step."""
        self.buffer.zero_()
        self._reached.clear()

    def add(self, gradients: Sequence[Tensor | None]) -> frozenset[int]:
        """Add the gradients of a pass, in the order of `parameters`; return the indices of those that are not None."""
        found = {index: gradient for index, gradient in enumerate(gradients) if gradient is not None}
        torch._foreach_add_([self._views[index] for index in found], list(found.values()))
        return frozenset(found)

    def reach(self, indices: Iterable[int]) -> None:
        """Note the parameters to which a pass has added: the optimizer leaves out those that none reaches."""
        self._reached.update(indices)

    def average(self, ranks: Ranks) -> None:
        """Average the sums over the ranks and hand them to the parameters; a collective call."""
        ranks.sum(self.buffer)
        if ranks.world_size > 1:
            self.buffer.div_(ranks.world_size)
        for index in self._reached:
            self.parameters[index].grad = self._views[index]
