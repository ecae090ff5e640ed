"""Kernel launches of a training step of R50 at one image per GPU: `python -m tests.bench.launches`; no GPU is needed.

Two counts of ATen operations, without views and allocations; an operation can launch several kernels. On the pretended GPU
of the tests the code takes the paths of CUDA, and attention counts as one operation each way. On the host torch's profiler
counts the operations that call no other, with those that take lists of tensors, of which CUDA makes one launch, as one. Its
second table leaves out what launches no kernel on any device: numbers made into tensors, and changes of sizes and strides.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from detr.batch import Batch
from pipeline.config import RunConfig
from pipeline.distributed.ranks import Ranks
from pipeline.training.ema import Ema
from pipeline.training.model import build_on_device
from pipeline.training.optim import build_optimizer
from pipeline.training.step import train_step
from tests.gpu.steps import run_config
from tests.gpu.work import Setting, batch_of
from tests.support.pretended_gpu import PretendedGpu, pretended_gpu

_CLASSES = 91
_SIZE = (64, 96)  # on the host, a larger one takes other convolutions of the library, before and after
_NO_KERNEL = ("_nnpack_available", "resize_as_", "as_strided_", "scalar_tensor", "promote_types")
_ONE_LAUNCH = ("aten::_foreach", "aten::_fused", "aten::_amp_foreach")
_VIEWS = (
    "view", "_unsafe_view", "_reshape_alias", "as_strided", "expand", "transpose", "t", "permute", "select", "slice",
    "unsqueeze", "squeeze", "detach", "detach_", "alias", "unbind", "split", "chunk", "narrow", "view_as", "reshape",
    "flatten", "unflatten", "movedim", "T", "expand_as", "result_type", "resolve_conj", "resolve_neg", "lift_fresh",
    "empty", "empty_like", "empty_strided", "new_empty", "resize_", "set_", "to", "contiguous", "is_nonzero", "item",
    "_local_scalar_dense", "split_with_sizes", "numpy_T", "requires_grad_", "_nested_tensor_size", "numpy", "cpu",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.launches", description=__doc__)
    parser.add_argument("--bf16", action="store_true", help="only on the host: bf16, as autocast does it on a CPU")
    parser.add_argument("--averages", action="store_true", help="average the weights, too")
    parser.add_argument("--rows", type=int, default=20, help="number of operations that are listed")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    setting = Setting("cpu", tiny=False)
    precision = "bf16" if options.bf16 else "fp32"
    config = run_config(setting, compute={"precision": precision}, optim={"ema": 0.999 if options.averages else 0.0})
    found = {"host": on_host(config)}
    if not options.bf16:
        found["pretended GPU"] = on_pretended_gpu(config)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for device, tables in found.items():
        for name, table in tables.items():
            print(f"\n{device}, {name}: {sum(table.values())}")
            for row, count in Counter(table).most_common(options.rows):
                print(f"{count:7} {row}")


class Steps:
    """Training steps of a run's code on one image."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        torch.manual_seed(0)
        self.config, self.ranks = config, Ranks(device=device)
        self.model = build_on_device(config, _CLASSES, device).train()
        self.optimizer = build_optimizer(self.model, config.optim)
        self.averages = Ema(self.model, config.optim.ema) if config.optim.ema else None
        self.batch: Batch = batch_of([_SIZE])
        self.number = 0

    def __call__(self, lap: Any) -> None:
        train_step(self.model, [self.batch], self.optimizer, self.config, self.ranks, self.number, lap=lap)
        if self.averages:
            self.averages.update(self.number)
            lap("averages")
        self.number += 1


def on_pretended_gpu(config: RunConfig) -> dict[str, dict[str, int]]:
    """Return the launches of the third step by phase, by file and by operation."""
    with pretended_gpu() as gpu, _kernels_of_cuda(gpu):
        steps = Steps(config, torch.device("cuda:0"))
        for _ in range(2):
            steps(lambda _: None)
        gpu.launches.clear()
        phases: Counter[str] = Counter()
        steps(lambda name: phases.update({name: gpu.launches.total() - phases.total()}))
    files: Counter[str] = Counter()
    operations: Counter[str] = Counter()
    for event, count in gpu.launches.items():
        files[event.file or "backward pass"] += count
        operations[f"{event.operation:40} {event.file or 'backward pass'}"] += count
    return {"by phase": phases, "by file": files, "by operation": operations}


@contextmanager
def _kernels_of_cuda(gpu: PretendedGpu) -> Iterator[None]:
    """Count attention and dropout as one operation forward and one backward, which other devices compute in several."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, name: str, work: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
            ctx.save_for_backward(*inputs)
            ctx.name, ctx.work = name, work
            return _counted(gpu, name, lambda: work(*inputs))  # type: ignore[no-any-return]

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
            def again() -> Any:
                leaves = [value.detach().requires_grad_() for value in ctx.saved_tensors]
                with torch.enable_grad():
                    found = torch.autograd.grad(ctx.work(*leaves), leaves, gradient)
                return [value.contiguous() if len(leaves) == 1 else _by_rows(value) for value in found]

            return (None, None, *_counted(gpu, f"{ctx.name}_backward", again))

    attend, drop = F.scaled_dot_product_attention, F.dropout

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0) -> Any:
        def work(*inputs: Tensor) -> Tensor:
            return _by_rows(attend(*inputs, attn_mask=attn_mask))

        return Once.apply("attention", work, q, k, v)

    def dropout(x: Tensor, p: float) -> Any:
        return Once.apply("dropout", partial(drop, p=p), x)

    with mock.patch.multiple(F, scaled_dot_product_attention=attention, dropout=dropout):
        yield


def _by_rows(x: Tensor) -> Tensor:
    """Return the same values in the memory layout of flash attention, [B, N, heads, width]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _counted(gpu: PretendedGpu, name: str, work: Callable[[], Any]) -> Any:
    """Return the result of the work, which counts as one launch."""
    before = gpu.launches.copy()
    result = work()
    gpu.launches.clear()
    gpu.launches.update(before)
    gpu.record(name)
    return result


def on_host(config: RunConfig) -> dict[str, dict[str, int]]:
    """Return the operations of the third step that call no other, and those with a kernel, from torch's profiler."""
    steps = Steps(config, torch.device("cpu"))
    for _ in range(2):
        steps(lambda _: None)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        steps(lambda _: None)
    operations: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    listed: set[int] = set()
    for event in profiler.events():
        parent = event.cpu_parent
        if id(parent) in listed:
            listed.add(id(event))
            continue
        if event.name.startswith(_ONE_LAUNCH):
            listed.add(id(event))
        elif not event.name.startswith("aten::") or event.name[6:] in _VIEWS or _calls_another(event):
            continue
        operations[event.name] += 1
        of_a_number = event.name == "aten::copy_" and not event.input_shapes[0]
        if event.name[6:] not in _NO_KERNEL and not of_a_number:
            kernels[event.name] += 1
    return {"by operation": operations, "kernels alone, by operation": kernels}


def _calls_another(event: Any) -> bool:
    return any(child.name.startswith("aten::") and child.name[6:] not in _VIEWS for child in event.cpu_children)


if __name__ == "__main__":
    main()
