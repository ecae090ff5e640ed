"""Predictions, loss and gradients of each precision and option of the device, against fp64 on the host."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from detr.batch import Batch, normalise
from detr.compute import Precision, Recompute, autocast, compile_shapes, set_channels_last, set_recompute
from detr.config import LossConfig, TransformConfig
from detr.criterion import compute_losses
from tests.bench import cases, peer
from tests.gpu.results import Results
from tests.gpu.work import Setting, batch_of, built, relative

_TRANSFORM = TransformConfig()


@dataclass(frozen=True)
class Options:
    """Way of computing on the device."""

    precision: Precision = "fp32"
    tf32: bool = False
    channels_last: bool = False
    recompute: Recompute = "none"
    compile: bool = False


@dataclass(frozen=True)
class Found:
    """Logits, boxes, loss and gradients by name of one forward and backward pass."""

    logits: Tensor
    boxes: Tensor
    loss: float
    gradients: dict[str, Tensor]


_OPTIONS = {
    "fp32": Options(),
    "fp32, channels last": Options(channels_last=True),
    "fp32, recompute both": Options(recompute="both"),
    "fp32, TF32": Options(tf32=True, channels_last=True),
    "bf16": Options(precision="bf16", channels_last=True),
    "bf16, compiled": Options(precision="bf16", channels_last=True, compile=True),
}


def run(results: Results, setting: Setting) -> None:
    batch = batch_of(setting.sizes((480, 640), (512, 600)))
    exact = _ours(setting, batch, "cpu", torch.float64)
    results.attempt("host fp32", lambda: _put(results, "host fp32", _ours(setting, batch, "cpu"), exact))
    for name, options in _OPTIONS.items():
        if setting.tiny and options.compile:
            continue
        _try(
            results,
            f"device {name}",
            lambda options=options: _ours(setting, batch, setting.device, options=options),
            exact,
        )
    if not peer.missing() and not setting.tiny:
        state = built(replace(setting.model, dropout=0.0)).state_dict()
        _try(results, "original, device fp32", lambda: _original(setting, batch, state, tf32=False), exact)
        _try(results, "original, device TF32", lambda: _original(setting, batch, state, tf32=True), exact)
    _set_tf32(False)


def _try(results: Results, name: str, work: Callable[[], Found], exact: Found) -> None:
    results.attempt(name, lambda: _put(results, name, work(), exact))


def _put(results: Results, name: str, found: Found, exact: Found) -> None:
    names = sorted(exact.gradients)
    flat = [torch.cat([gradients[n].flatten() for n in names]) for gradients in (found.gradients, exact.gradients)]
    results.put(
        f"{name} against host fp64",
        logits=relative(found.logits, exact.logits),
        boxes=relative(found.boxes, exact.boxes),
        loss=abs(found.loss - exact.loss) / abs(exact.loss),
        gradients=relative(*flat),
        same_names=names == sorted(found.gradients),
    )


def _ours(
    setting: Setting, batch: Batch, device: str, dtype: torch.dtype = torch.float32, options: Options | None = None
) -> Found:
    options = options or Options()
    _set_tf32(options.tf32)
    model = built(replace(setting.model, dropout=0.0), dtype).to(device)
    if options.channels_last:
        set_channels_last(model)
    set_recompute(model, options.recompute)
    if options.compile:
        compile_shapes(model)
    moved = batch.to(torch.device(device))
    with autocast(torch.device(device), options.precision):
        outputs = model(normalise(moved, _TRANSFORM).to(dtype), moved.padding)
    boxes = float(sum(len(target.labels) for target in batch.targets))
    losses = compute_losses(outputs, list(batch.targets), boxes, LossConfig())
    losses.total.backward()
    gradients = {name: p.grad.cpu().double() for name, p in model.named_parameters() if p.grad is not None}
    return Found(outputs.logits, outputs.boxes, float(losses.total.detach()), gradients)


def _original(setting: Setting, batch: Batch, state: dict[str, Tensor], *, tf32: bool) -> Found:
    _set_tf32(tf32)
    model, criterion = peer.build(dropout=0.0, device=setting.device)
    model.load_state_dict(state)
    model.to(setting.device).train()
    moved = batch.to(torch.device(setting.device))
    outputs = model(peer.nested(normalise(moved, _TRANSFORM), cases.mask(moved.images, moved.padding)))
    losses = criterion(outputs, cases.peer_targets(batch.targets, setting.device))
    total = sum(losses[name] * weight for name, weight in criterion.weight_dict.items() if name in losses)
    total.backward()
    gradients = {name: p.grad.cpu().double() for name, p in model.named_parameters() if p.grad is not None}
    return Found(outputs["pred_logits"], outputs["pred_boxes"], float(total.detach()), gradients)


def _set_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
