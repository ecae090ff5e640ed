"""One training step: places where the host waits, kernels and copies, launches, busy time, phases."""

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from detr.batch import Batch, normalise
from detr.compute import set_channels_last, set_recompute
from detr.config import TransformConfig
from pipeline.config import ComputeConfig, OptimConfig, RunConfig
from pipeline.distributed.ranks import Ranks
from pipeline.training.ema import Ema
from pipeline.training.model import build_trainable_model
from pipeline.training.optim import build_optimizer
from pipeline.training.step import train_step
from tests.bench import cases, peer
from tests.gpu.results import Results
from tests.gpu.work import CLASSES, Setting, batch_of, calm

_LARGEST = 10
_REHEARSED = ("fp32", "bf16, averages", "bf16, two micro-batches", "fp32, mask head")


@dataclass(frozen=True)
class Kind:
    """A kind of step: its configuration and its micro-batches."""

    config: RunConfig
    batches: list[Batch]


class Step:
    """Training steps of a run's own code, always on the same batches."""

    def __init__(self, kind: Kind, setting: Setting) -> None:
        config = kind.config
        torch.manual_seed(0)
        self.model = build_trainable_model(config, CLASSES)
        calm(self.model)
        self.model.to(setting.device).train()
        if config.compute.channels_last:
            set_channels_last(self.model)
        set_recompute(self.model, config.compute.recompute)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.averages = Ema(self.model, config.optim.ema) if config.optim.ema else None
        self.kind = kind
        self.ranks = Ranks(device=torch.device(setting.device))
        self.number = 0

    def __call__(self) -> Any:
        self.number += 1
        config = self.kind.config
        result = train_step(self.model, self.kind.batches, self.optimizer, config, self.ranks, self.number)
        if self.averages:
            self.averages.update(self.number)
        return result


def run(results: Results, setting: Setting) -> None:
    for name, kind in kinds(setting).items():
        if setting.tiny and name not in _REHEARSED:
            continue
        results.attempt(name, lambda name=name, kind=kind: _measure(results, name, kind, setting))
        if setting.cuda:
            torch.cuda.empty_cache()
    if not peer.missing() and not setting.tiny:
        results.attempt("original fp32", lambda: _measure_original(results, setting))


def run_config(setting: Setting, **changes: Any) -> RunConfig:
    """Return a run of R50 or of a small model."""
    model = replace(setting.model, backbone_weights="random", **changes.pop("model", {}))
    compute = replace(ComputeConfig(), **changes.pop("compute", {}))
    return RunConfig(model=model, compute=compute, optim=replace(OptimConfig(), **changes.pop("optim", {})))


def kinds(setting: Setting) -> dict[str, Kind]:
    """Return the kinds of steps that differ in what they ask of the device."""
    pinned = setting.cuda
    eight = batch_of(setting.sizes(*[(800, 1066)] * 4, *[(768, 1024)] * 4), pinned=pinned)
    one = batch_of(setting.sizes((800, 1066)), pinned=pinned)
    masked = batch_of(setting.sizes((640, 640), (600, 640)), masks=True, pinned=pinned)
    bf16 = {"precision": "bf16"}
    masks = {"masks": True, "hidden_dim": 128 if setting.tiny else 256}
    found = {
        "fp32": Kind(run_config(setting), [eight]),
        "bf16": Kind(run_config(setting, compute=bf16), [eight]),
        "fp32, one image": Kind(run_config(setting), [one]),
        "bf16, one image": Kind(run_config(setting, compute=bf16), [one]),
        "bf16, averages": Kind(run_config(setting, compute=bf16, optim={"ema": 0.999}), [eight]),
        "bf16, losses per rank": Kind(run_config(setting, compute=bf16, optim={"normalise": "per_rank"}), [eight]),
        "bf16, two micro-batches": Kind(run_config(setting, compute=bf16), [one, one]),
        "bf16, recompute both": Kind(run_config(setting, compute=bf16 | {"recompute": "both"}), [eight]),
        "bf16, masks": Kind(run_config(setting, compute=bf16, model=masks), [masked]),
        "fp32, mask head": Kind(run_config(setting, model=masks, optim={"train": "mask_head"}), [masked]),
    }
    return found


def _measure(results: Results, name: str, kind: Kind, setting: Setting) -> None:
    step = Step(kind, setting)
    for _ in range(1 if setting.tiny else 3):
        result = step()
    waits = setting.waits(step)
    row = {"waits": len(waits), "where": waits, "loss": float(result.losses.total.detach())}
    if name.partition(",")[2] in ("", " one image"):
        row |= profiled(step, setting)
    results.put(name, **row)


def _measure_original(results: Results, setting: Setting) -> None:
    for name, kind in kinds(setting).items():
        if name not in ("fp32", "fp32, one image"):
            continue
        step = cases.training_peer("fp32", setting.device)
        moved = kind.batches[0].to(torch.device(setting.device))
        images = normalise(moved, TransformConfig())
        truth = kind.batches[0].targets

        def work(step: Any = step, images: Any = images, moved: Batch = moved, truth: Any = truth) -> None:
            step(images, moved.padding, truth)

        for _ in range(3):
            work()
        waits = setting.waits(work)
        results.put(f"original {name}", waits=len(waits), where=sorted(set(waits)), **profiled(work, setting))


def profiled(work: Any, setting: Setting) -> dict[str, Any]:
    """Return the time of a step, its kernels and copies, launches and busy time, and its largest kernels."""
    steps = 1 if setting.tiny else 3
    plain = setting.seconds(work, 3 * steps)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.cuda else [])]
    start = time.perf_counter()
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            work()
        setting.wait()
    took = time.perf_counter() - start
    events = profiler.key_averages()
    kernels = [event for event in profiler.events() if str(event.device_type).endswith("CUDA")]
    operations = sum(event.count for event in events if event.key.startswith("aten::"))
    order = "self_device_time_total" if setting.cuda else "self_cpu_time_total"
    print(events.table(sort_by=order, row_limit=_LARGEST, max_name_column_width=70))
    busy = sum(kernel.device_time_total for kernel in kernels)
    return {
        "step_ms": plain * 1e3,
        "profiled_ms": took / steps * 1e3,
        "kernels": len(kernels) / steps,
        "launches": sum(event.count for event in events if "LaunchKernel" in event.key) / steps,
        "operations": operations / steps,
        "busy_ms": busy / steps / 1e3,
    }
