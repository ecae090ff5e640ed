"""Activation checkpointing: keep what goes into a part of the network, compute what is inside again when it is needed."""

from torch import Tensor, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint


def call(module: nn.Module, *inputs: Tensor | None, again: bool) -> Tensor:
    """Call a module; with `again`, and where gradients will be asked for, its activations are not kept.

    Dropout draws the same numbers the second time. What holds no parameter that trains and gets no input that does is
    called as ever: nothing would be kept of it anyway.
    """
    if again and is_grad_enabled() and _asks_gradients(module, *inputs):
        return checkpoint(module, *inputs, use_reentrant=False)  # type: ignore[no-any-return]
    return module(*inputs)  # type: ignore[no-any-return]


def _asks_gradients(module: nn.Module, *inputs: Tensor | None) -> bool:
    return any(value is not None and value.requires_grad for value in (*inputs, *module.parameters()))
