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

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from tests.support.pretended_gpu.record import DEVICE, Event, PretendedGpu, start
from tests.support.pretended_gpu.runtime import RUNTIME, HostStager, enter_no_grad, exit_no_grad, pin, set_device
from tests.support.pretended_gpu.tensors import Mode, TwoDevicesError

__all__ = ["Event", "HostStager", "PretendedGpu", "TwoDevicesError", "pretended_gpu"]


@contextmanager
def pretended_gpu() -> Iterator[PretendedGpu]:
    """Pretend in the block that `cuda:0` exists; yield the record, which starts empty."""
    record = start()
    set_device(DEVICE)
    lifted = torch._C._only_lift_cpu_tensors()
    overwritten = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # `model.to` makes new parameters
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device="cuda:0")` is built on the host, then moved
    try:
        with (
            mock.patch.multiple("torch.cuda", **RUNTIME),
            mock.patch.object(torch.Tensor, "pin_memory", pin),
            mock.patch("torch.nn.utils.clip_grad._device_has_foreach_support", return_value=True),
            mock.patch.object(torch.inference_mode, "__enter__", enter_no_grad),
            mock.patch.object(torch.inference_mode, "__exit__", exit_no_grad),
            Mode(),
        ):
            yield record
    finally:
        torch._C._set_only_lift_cpu_tensors(lifted)
        torch.__future__.set_overwrite_module_params_on_conversion(overwritten)
