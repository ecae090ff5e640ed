"""Tensors that say `cuda:0` and compute on the host, and the mode that makes them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from tests.support.pretended_gpu.record import DEVICE, event_here, recorded

# Operations whose result has a size that depends on values: the host waits for it.
_SIZED_BY_VALUES = {
    f"aten.{name}"
    for name in (
        "nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "repeat_interleave", "bincount",
        "equal", "is_nonzero", "histc",
    )
}  # fmt: skip
# Operations that make or change no element: they allocate, or read the shape.
_WITHOUT_KERNEL = {
    f"aten.{name}"
    for name in (
        "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_", "lift_fresh",
        "_unsafe_view",
    )
}  # fmt: skip
_INDEXING = {"aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_"}


class TwoDevicesError(RuntimeError):
    """Raised when an operation gets tensors of both devices, as CUDA does."""


class OnGpu(torch.Tensor):
    """Tensor on the pretended device; `elem` has its values."""

    elem: torch.Tensor

    @staticmethod
    def __new__(cls, elem: torch.Tensor) -> OnGpu:
        made: OnGpu = torch.Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            layout=elem.layout,
            device="meta",
            requires_grad=False,
        )
        made.elem = elem
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    def tolist(self) -> Any:
        recorded().waits.append(event_here("tolist"))
        return self.elem.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({self.elem!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Mode(TorchDispatchMode):
    """Mode that sees the operations without a tensor of the device, too: factories and copies to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Do an operation on the values; raise, or record a wait, where a GPU would."""
    recorded().operations += 1
    name = str(func).rsplit(".", 1)[0]
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    on_gpu = [tensor for tensor in tensors if isinstance(tensor, OnGpu)]
    device = kwargs.get("device")
    if name in ("aten._to_copy", "aten.to"):
        return _moved(name, args[0], kwargs)
    if name == "aten.copy_":
        return _copied(func, name, args, kwargs)
    if name == "aten._local_scalar_dense":
        if on_gpu:
            recorded().waits.append(event_here(name))
        return func(*tree_map(_bare, args), **kwargs)
    if on_gpu:
        _check_devices(name, func, tensors)
        if name in _SIZED_BY_VALUES or (name in _INDEXING and _has_mask(args[1])):
            recorded().waits.append(event_here(name))
    made_on_gpu = bool(on_gpu) if device is None else _is_gpu(device)
    if made_on_gpu and not func.is_view and name not in _WITHOUT_KERNEL:
        recorded().record(name)
    given = dict(kwargs)
    if device is not None and (made_on_gpu or on_gpu):
        given["device"] = torch.device("cpu")
    result = func(*tree_map(_bare, args), **tree_map(_bare, given))
    same = {id(tensor.elem): tensor for tensor in on_gpu}  # of operations in place

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in same:
            return same[id(value)]
        return OnGpu(value) if made_on_gpu else value

    return tree_map(wrapped, result)


def _moved(name: str, source: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    device = kwargs.get("device")
    to_gpu = isinstance(source, OnGpu) if device is None else _is_gpu(device)
    if isinstance(source, OnGpu) and not to_gpu and source.numel():  # torch does not copy what is empty
        recorded().waits.append(event_here(name))
    if not isinstance(source, OnGpu) and to_gpu and not kwargs.get("non_blocking"):
        recorded().blocking_copies.append(event_here(name))
    same = isinstance(source, OnGpu) and to_gpu and kwargs.get("dtype") in (None, source.dtype)
    if (to_gpu or isinstance(source, OnGpu)) and not same:  # C++ asks for what is there already, because it sees `meta`
        recorded().record(name)
    if not isinstance(source, OnGpu) and to_gpu:
        recorded().copies_from_host.append(event_here(name))
    others = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
    moved: torch.Tensor = torch.ops.aten._to_copy.default(_bare(source), **others)
    return OnGpu(moved) if to_gpu else moved


def _copied(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    target: torch.Tensor
    target, source, *rest = args
    if isinstance(source, OnGpu) and not isinstance(target, OnGpu) and source.numel():
        recorded().waits.append(event_here(name))
    elif isinstance(target, OnGpu) and not isinstance(source, OnGpu) and source.dim() and not any(rest):
        recorded().blocking_copies.append(event_here(name))
    if isinstance(source, OnGpu) or isinstance(target, OnGpu):
        recorded().record(name)
    if isinstance(target, OnGpu) and not isinstance(source, OnGpu):
        recorded().copies_from_host.append(event_here(name))
    func(*tree_map(_bare, args), **kwargs)
    return target


def _check_devices(name: str, func: Any, tensors: list[torch.Tensor]) -> None:
    """Raise `TwoDevicesError` as CUDA does: scalars may be on the host, and so may indices, which costs a copy."""
    on_host = [tensor for tensor in tensors if not isinstance(tensor, OnGpu) and tensor.dim() > 0]
    if on_host and name in _INDEXING:
        recorded().blocking_copies.append(event_here(name))
    elif on_host:
        shapes = [tuple(tensor.shape) for tensor in on_host]
        raise TwoDevicesError(
            f"{func} in {event_here(name).file or 'torch'}: operands on cuda:0 and, of shapes {shapes}, cpu"
        )


def _has_mask(indices: Any) -> bool:
    return any(isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _is_gpu(device: Any) -> bool:
    return torch.device(device).type in ("cuda", "meta")  # C++ calls it meta


def _bare(value: Any) -> Any:
    return value.elem if isinstance(value, OnGpu) else value
