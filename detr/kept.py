"""Results kept or computed again: what depends on constant tensors, casts under autocast, activations of layers."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint


@lru_cache(maxsize=64)
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return fp32 numbers on a device, copied there once."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)


def number(value: float, dtype: torch.dtype) -> Tensor:
    """Return a number as a tensor on the host, which torch would otherwise make in each operation that takes it."""
    if torch.compiler.is_compiling():  # a constant of the compiled code
        return torch.tensor(value, dtype=dtype, device="cpu")
    return _kept_number(value, dtype)


@lru_cache(maxsize=64)
def _kept_number(value: float, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")


def autocast_type(tensor: Tensor) -> torch.dtype:
    """Return the type that autocast computes products of this tensor in; without autocast, its own."""
    kind = tensor.device.type
    casts = tensor.dtype == torch.float32 and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if casts else tensor.dtype


class Kept:
    """Result of a computation on tensors that are not trained.

    A change is seen by the tensors themselves (another device, another type) and by torch's count of changes in place.
    Tensors that are replaced through `.data` are not seen. The result is renewed in its own memory, which a CUDA graph may
    read. Copies of the owner start empty.
    """

    def __init__(self) -> None:
        self._sources: tuple[Tensor | None, ...] = ()
        self._versions: list[int] = []
        self._result: tuple[Tensor, ...] = ()

    def of(self, sources: tuple[Tensor | None, ...], compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Return `compute()`, without gradients, or the last result if the sources are the same and unchanged."""
        if any(source.is_inference() for source in sources if source is not None):
            return compute()  # such tensors count no changes
        versions = [source._version for source in sources if source is not None]
        same = len(sources) == len(self._sources) and all(map(_is, sources, self._sources))
        if not same or versions != self._versions:
            # A result of inference mode could not be used in training.
            with torch.inference_mode(False), torch.no_grad():
                self._renew(compute())
            self._sources, self._versions = sources, versions
        return self._result

    def _renew(self, result: tuple[Tensor, ...]) -> None:
        if len(result) == len(self._result) and all(map(_alike, result, self._result)):
            for kept, new in zip(self._result, result, strict=True):
                kept.copy_(new)
        else:
            self._result = result

    def __deepcopy__(self, memo: dict[int, Any]) -> "Kept":
        return Kept()

    def __reduce__(self) -> tuple[type["Kept"], tuple[()]]:
        return Kept, ()


def _is(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.device, one.dtype, one.stride()) == (other.shape, other.device, other.dtype, other.stride())


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
