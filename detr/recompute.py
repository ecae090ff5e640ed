"""Activation checkpointing: keep only a module's inputs, and recompute its activations in the backward pass."""

from torch import Tensor, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint


def run_layer(module: nn.Module, *inputs: object, recompute: bool) -> Tensor:
    """Return `module(*inputs)`; with `recompute`, its activations are recomputed in the backward pass instead of kept.

    Dropout draws the same numbers both times. A module without trainable parameters or inputs is called directly, since
    autograd keeps nothing of it.
    """
    if recompute and is_grad_enabled() and _needs_gradients(module, *inputs):
        return checkpoint(module, *inputs, use_reentrant=False)  # type: ignore[no-any-return]
    return module(*inputs)  # type: ignore[no-any-return]


def _needs_gradients(module: nn.Module, *inputs: object) -> bool:
    return any(isinstance(value, Tensor) and value.requires_grad for value in (*inputs, *module.parameters()))
