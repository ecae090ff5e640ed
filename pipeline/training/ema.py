"""Exponential moving average of the trained weights (`optim.ema`), which is then evaluated and registered.

A departure from the paper, which evaluates the weights themselves; off by default. After each update the average moves
towards the weights by `1 - decay`. In the first steps it moves faster (TensorFlow's rule), or a short run would be
evaluated with nearly its initial weights. Buffers, such as those of a trainable batch norm, are not averaged.

The average depends only on the weights and the step, is sharded over the ranks like the parameters, and is saved in
checkpoints, so stopping a run or changing its number of workers does not change it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.distributed.parallel import local_tensor, unwrap


class Ema:
    """Moving averages of all parameters; under FSDP, of this rank's shards.

    `averages` holds them by parameter name, with the dtype, layout and device of the parameter.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        named = dict(unwrap(model).named_parameters())
        self._decay = decay
        self._parameters: list[Tensor] = list(named.values())
        self.averages = {name: parameter.detach().clone() for name, parameter in named.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the weights after the update of `step` (counted from 0), without a device sync."""
        averages = [local_tensor(value) for value in self.averages.values()]
        weights = [local_tensor(value) for value in self._parameters]
        torch._foreach_lerp_(averages, weights, 1.0 - decay_at(self._decay, step))


def decay_at(decay: float, step: int) -> float:
    """Return the decay of the average at the update of `step` (counted from 0), lower in the first steps."""
    return min(decay, (2 + step) / (11 + step))
