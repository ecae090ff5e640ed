"""A GPU that is pretended: tensors that say `cuda:0` and compute on the host.

A machine without a GPU sees with them what only a GPU would show: operands on two devices, which raise `TwoDevicesError`,
and every moment at which the host waits for the device.

    with pretended_gpu() as gpu:
        model.to("cuda:0")
        train_step(...)
    gpu.waits  # [Event("aten._local_scalar_dense", "matcher.py"), ...]

C++ sees the tensors as `meta`, so that the autograd engine needs no CUDA device; Python sees `cuda:0`. Values are real, so
the matcher, the guard and the optimizer run as they do.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

_ROOT = f"{Path(__file__).parents[2]}/"
_OURS = (f"{_ROOT}detr/", f"{_ROOT}pipeline/")
_DEVICE = torch.device("cuda:0")
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


@dataclass(frozen=True)
class Event:
    """Operation, and the file of this project that called it; empty if none did, as in a backward pass."""

    operation: str
    file: str


@dataclass
class PretendedGpu:
    """Record of what happened on the device."""

    waits: list[Event] = field(default_factory=list)
    """Moments at which the host waits for the device."""
    blocking_copies: list[Event] = field(default_factory=list)
    """Copies to the device that are not `non_blocking`."""
    copies_from_host: list[Event] = field(default_factory=list)
    """All copies to the device."""
    operations: int = 0
    """Number of operations, on either device."""
    launches: Counter[Event] = field(default_factory=Counter)
    """Operations of the device that launch at least one kernel: all but views and allocations."""

    strays: list[str] = field(default_factory=list)
    """Uses of CUDA's runtime in threads that have not chosen a device, which make a context on GPU 0: "THREAD: CALL"."""
    chosen: threading.local = field(default_factory=threading.local)

    def touch(self, call: str) -> None:
        """Record a use of the runtime; the thread that began to pretend has chosen its device, as Ray does it."""
        if not getattr(self.chosen, "device", None):
            self.strays.append(f"{threading.current_thread().name}: {call}")

    def record(self, operation: str) -> None:
        """Count an operation as a launch."""
        self.launches[_event(operation)] += 1


_recorded = PretendedGpu()


class _OnGpu(torch.Tensor):
    """Tensor on the pretended device; `elem` has its values."""

    elem: torch.Tensor

    @staticmethod
    def __new__(cls, elem: torch.Tensor) -> _OnGpu:
        made: _OnGpu = torch.Tensor._make_wrapper_subclass(
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
    device = property(lambda self: _DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    def tolist(self) -> Any:
        _recorded.waits.append(_event("tolist"))
        return self.elem.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({self.elem!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Mode that sees the operations without a tensor of the device, too: factories and copies to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _CudaEvent:
    """Mark in a stream, whose work is done at once."""

    def __init__(self, **_: Any) -> None:
        self._at = 0.0

    def record(self, *_: Any) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        """Return at once."""

    def elapsed_time(self, end: _CudaEvent) -> float:
        return (end._at - self._at) * 1e3


class _Stream:
    """Stream of the device; all are in order."""

    def __init__(self, *_: Any) -> None:
        _recorded.touch("Stream")

    def record_event(self) -> _CudaEvent:
        return _CudaEvent()

    def wait_event(self, event: _CudaEvent) -> None:
        """Return at once."""


class HostStager:
    """Stager of checkpoints that copies each tensor, in place of torch's, which copies memory that is not there."""

    def __init__(self, *_: Any) -> None:
        """Take any options."""

    def stage(self, state: Any) -> Any:
        return tree_map(lambda value: value.cpu().clone() if isinstance(value, torch.Tensor) else value, state)

    def close(self) -> None:
        """Do nothing."""


def _set_device(device: Any) -> None:
    _recorded.chosen.device = torch.device(device)


def _pin(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
    _recorded.touch("pin_memory")
    return tensor


_RUNTIME: dict[str, Any] = {
    "_lazy_init": lambda: None,
    "set_device": _set_device,
    "current_stream": lambda *_: _Stream(),
    "stream": lambda *_: nullcontext(),
    "Stream": _Stream,
    "Event": _CudaEvent,
    "max_memory_allocated": lambda *_: 0,
    "get_device_name": lambda *_: "pretended",
}


@contextmanager
def pretended_gpu() -> Iterator[PretendedGpu]:
    """Pretend in the block that `cuda:0` exists; yield the record, which starts empty."""
    global _recorded
    _recorded = PretendedGpu()
    _set_device(_DEVICE)
    lifted = torch._C._only_lift_cpu_tensors()
    overwritten = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # `model.to` makes new parameters
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device="cuda:0")` is built on the host, then moved
    try:
        with (
            mock.patch.multiple("torch.cuda", **_RUNTIME),
            mock.patch.object(torch.Tensor, "pin_memory", _pin),
            mock.patch("torch.nn.utils.clip_grad._device_has_foreach_support", return_value=True),
            mock.patch.object(torch.inference_mode, "__enter__", _enter_no_grad),
            mock.patch.object(torch.inference_mode, "__exit__", _exit_no_grad),
            _Mode(),
        ):
            yield _recorded
    finally:
        torch._C._set_only_lift_cpu_tensors(lifted)
        torch.__future__.set_overwrite_module_params_on_conversion(overwritten)


def _enter_no_grad(self: Any) -> None:
    """Record no gradients instead, because tensors of inference mode have no version, which a subclass needs."""
    self.before = torch.is_grad_enabled()
    torch.set_grad_enabled(self.before and not self.mode)


def _exit_no_grad(self: Any, *_: object) -> None:
    torch.set_grad_enabled(self.before)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Do an operation on the values; raise, or record a wait, where a GPU would."""
    _recorded.operations += 1
    name = str(func).rsplit(".", 1)[0]
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    on_gpu = [tensor for tensor in tensors if isinstance(tensor, _OnGpu)]
    device = kwargs.get("device")
    if name in ("aten._to_copy", "aten.to"):
        return _moved(name, args[0], kwargs)
    if name == "aten.copy_":
        return _copied(func, name, args, kwargs)
    if name == "aten._local_scalar_dense":
        if on_gpu:
            _recorded.waits.append(_event(name))
        return func(*tree_map(_bare, args), **kwargs)
    if on_gpu:
        _check_devices(name, func, tensors)
        if name in _SIZED_BY_VALUES or (name in _INDEXING and _has_mask(args[1])):
            _recorded.waits.append(_event(name))
    made_on_gpu = bool(on_gpu) if device is None else _is_gpu(device)
    if made_on_gpu and not func.is_view and name not in _WITHOUT_KERNEL:
        _recorded.record(name)
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
        return _OnGpu(value) if made_on_gpu else value

    return tree_map(wrapped, result)


def _moved(name: str, source: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    device = kwargs.get("device")
    to_gpu = isinstance(source, _OnGpu) if device is None else _is_gpu(device)
    if isinstance(source, _OnGpu) and not to_gpu and source.numel():  # torch does not copy what is empty
        _recorded.waits.append(_event(name))
    if not isinstance(source, _OnGpu) and to_gpu and not kwargs.get("non_blocking"):
        _recorded.blocking_copies.append(_event(name))
    same = isinstance(source, _OnGpu) and to_gpu and kwargs.get("dtype") in (None, source.dtype)
    if (
        to_gpu or isinstance(source, _OnGpu)
    ) and not same:  # C++ asks for what is there already, because it sees `meta`
        _recorded.record(name)
    if not isinstance(source, _OnGpu) and to_gpu:
        _recorded.copies_from_host.append(_event(name))
    others = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
    moved: torch.Tensor = torch.ops.aten._to_copy.default(_bare(source), **others)
    return _OnGpu(moved) if to_gpu else moved


def _copied(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    target: torch.Tensor
    target, source, *rest = args
    if isinstance(source, _OnGpu) and not isinstance(target, _OnGpu) and source.numel():
        _recorded.waits.append(_event(name))
    elif isinstance(target, _OnGpu) and not isinstance(source, _OnGpu) and source.dim() and not any(rest):
        _recorded.blocking_copies.append(_event(name))
    if isinstance(source, _OnGpu) or isinstance(target, _OnGpu):
        _recorded.record(name)
    if isinstance(target, _OnGpu) and not isinstance(source, _OnGpu):
        _recorded.copies_from_host.append(_event(name))
    func(*tree_map(_bare, args), **kwargs)
    return target


def _check_devices(name: str, func: Any, tensors: list[torch.Tensor]) -> None:
    """Raise `TwoDevicesError` as CUDA does: scalars may be on the host, and so may indices, which costs a copy."""
    on_host = [tensor for tensor in tensors if not isinstance(tensor, _OnGpu) and tensor.dim() > 0]
    if on_host and name in _INDEXING:
        _recorded.blocking_copies.append(_event(name))
    elif on_host:
        shapes = [tuple(tensor.shape) for tensor in on_host]
        raise TwoDevicesError(
            f"{func} in {_event(name).file or 'torch'}: operands on cuda:0 and, of shapes {shapes}, cpu"
        )


def _has_mask(indices: Any) -> bool:
    return any(isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _is_gpu(device: Any) -> bool:
    return torch.device(device).type in ("cuda", "meta")  # C++ calls it meta


def _bare(value: Any) -> Any:
    return value.elem if isinstance(value, _OnGpu) else value


def _event(operation: str) -> Event:
    """Return the operation with the innermost frame of this project's packages."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_OURS):
            return Event(operation, path[len(_ROOT) :])
        frame = frame.f_back
    return Event(operation, "")
