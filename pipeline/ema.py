"""An exponential moving average of the trained weights (`optim.ema`), which is what is evaluated and registered.

A departure from the paper, which evaluates the weights themselves; off by default. After each update the average moves
towards the weights by `1 - decay`. In the first steps it moves faster, as the average over few steps would (TensorFlow's
rule), or a short run would be evaluated with its first weights. Buffers, as of a trainable batch norm, are the model's own.

The average is a function of the weights and the step, divided among the ranks as the parameters are, and part of the
checkpoint, so it does not matter where a run was stopped or how many workers it has.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pipeline.parallel import unwrap


class Ema:
    """Averages of the parameters; under FSDP of this rank's parts. Those that are frozen stay what they are.

    averages: by the parameters' names, of their type, layout and place.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        named = dict(unwrap(model).named_parameters())
        self._decay = decay
        self._parameters: list[Tensor] = list(named.values())
        self.averages = {name: parameter.detach().clone() for name, parameter in named.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights that the update of `step` (counted from 0) has left; nothing waits for the device."""
        own, current = ([_local(value) for value in values] for values in (self.averages.values(), self._parameters))
        torch._foreach_lerp_(own, current, 1.0 - decay_at(self._decay, step))


def decay_at(decay: float, step: int) -> float:
    """What the update of `step` (counted from 0) keeps of the average."""
    return min(decay, (2 + step) / (11 + step))


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value
