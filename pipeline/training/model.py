"""The model of a run in a worker: built, with the first weights that the driver wrote."""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from detr.batch import Batch, normalise
from detr.compute import autocast, set_channels_last, set_recompute
from detr.model import DETR, build_model, freeze_detector
from detr.original import load_original_state_dict, to_original_state_dict
from pipeline.checkpoint.location import Location
from pipeline.checkpoint.patience import patiently
from pipeline.checkpoint.visibility import check_seen, not_seen
from pipeline.config import RunConfig
from pipeline.distributed.ranks import Ranks, on_first
from pipeline.run_folder import INITIAL_NAME
from shards.store import storage


def build_trainable_model(config: RunConfig, num_classes: int) -> DETR:
    """Return the run's model with random weights, with the modules frozen that are not trained."""
    model = build_model(config.model, num_classes)
    if config.optim.train == "mask_head":
        freeze_detector(model)
    if config.optim.lr_backbone == 0:
        # Here, not with the optimizer: DDP waits for the gradient of all that could have one when it wraps the model.
        model.backbone.requires_grad_(False)
    return model


def save_initial(model: DETR, folder: Location) -> None:
    """Write the run's initial weights to its location."""
    weights = {name: value.contiguous() for name, value in to_original_state_dict(model).items()}
    storage.write(str(folder / INITIAL_NAME), save(weights))


def read_initial(model: DETR, folder: Location, ranks: Ranks) -> None:
    """Load the run's initial weights into a model: rank 0 reads them and sends them to the others; a collective call.

    Raise `CheckpointError` if the file is missing: the driver wrote it before any worker started.
    """
    check_seen(folder / INITIAL_NAME, ranks)
    patiently(ranks, lambda: on_first(ranks, lambda: _load_initial(model, folder)))
    ranks.send_tensors(model.state_dict().values())


def _load_initial(model: DETR, folder: Location) -> None:
    path = folder / INITIAL_NAME
    try:
        content = storage.read(str(path))
    except FileNotFoundError:
        raise not_seen(path, platform.node()) from None
    load_original_state_dict(model, load(content))


def predict(model: Callable[..., Any], batch: Batch, config: RunConfig) -> Any:
    """Return a model's predictions for a batch on its device, in the precision of the run."""
    images = normalise(batch, config.transform)
    with autocast(images.device, config.compute.precision):
        return model(images, batch.padding)


def host_copy(model: nn.Module) -> DETR:
    """Return a copy of a model on the host, which training does not change; the device needs no memory for it."""
    on_host: dict[int, Tensor] = {
        id(value): value.detach().to("cpu", copy=True) for value in (*model.parameters(), *model.buffers())
    }
    for parameter in model.parameters():
        on_host[id(parameter)] = nn.Parameter(on_host[id(parameter)], requires_grad=False)
    copied: DETR = copy.deepcopy(model, on_host)  # type: ignore[assignment]
    return copied.eval()


def build_on_device(config: RunConfig, num_classes: int, device: torch.device) -> DETR:
    """Return the run's model on a device, not yet wrapped for several workers."""
    compute = config.compute
    model = build_trainable_model(config, num_classes).to(device)
    if compute.channels_last:
        set_channels_last(model)
    set_recompute(model, compute.recompute)
    return model
