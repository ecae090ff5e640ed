"""The model of a run in a worker: built, with the first weights that the driver wrote."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from detr.compute import set_channels_last, set_recompute
from detr.model import DETR, build_model, freeze_detector
from detr.original import load_original_state_dict, to_original_state_dict
from pipeline.config import RunConfig
from pipeline.errors import CheckpointError
from pipeline.run_folder import INITIAL_NAME


def build_trainable_model(config: RunConfig, num_classes: int) -> DETR:
    """Return the run's model with random weights, with the modules frozen that are not trained."""
    model = build_model(config.model, num_classes)
    if config.optim.train == "mask_head":
        freeze_detector(model)
    if config.optim.lr_backbone == 0:
        # Here, not with the optimizer: DDP waits for the gradient of all that could have one when it wraps the model.
        model.backbone.requires_grad_(False)
    return model


def save_initial(model: DETR, folder: Path) -> None:
    """Write the run's initial weights into its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in to_original_state_dict(model).items()}
    save_file(weights, folder / INITIAL_NAME)


def read_initial(model: DETR, folder: Path) -> None:
    """Load the run's initial weights into a model.

    Raise `CheckpointError` if the file is missing: the driver wrote it before any worker started.
    """
    path = folder / INITIAL_NAME
    if not path.exists():
        raise CheckpointError(
            f"{path} is not there on {platform.node()}; expected the run's folder as the driver made it: give a "
            "--storage that every node sees, mounted at the same path"
        )
    load_original_state_dict(model, load_file(path))


def build_on_device(config: RunConfig, num_classes: int, device: torch.device) -> DETR:
    """Return the run's model on a device, not yet wrapped for several workers."""
    compute = config.compute
    model = build_trainable_model(config, num_classes).to(device)
    if compute.channels_last:
        set_channels_last(model)
    set_recompute(model, compute.recompute)
    return model
