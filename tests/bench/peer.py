"""The original's code, from a checkout that `PEER_DETR` names, made to run on today's torchvision.

Nothing of it is copied here, and the checkout stays unchanged: code that no longer runs is replaced in memory.
"""

import importlib
import os
import sys
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

VARIABLE = "PEER_DETR"


def missing() -> str:
    """Return the reason why the original cannot be run; empty if it can."""
    folder = os.environ.get(VARIABLE, "")
    if not folder:
        return f"{VARIABLE} names no checkout of the original (https://github.com/facebookresearch/detr)"
    if not (Path(folder) / "models" / "detr.py").exists():
        return f"{VARIABLE}={folder} holds no models/detr.py; expected a checkout of the original"
    return ""


def build(*, dilation: bool = False, dropout: float = 0.1, masks: bool = False, device: str = "cpu") -> tuple[Any, Any]:
    """Return the original's R50 (with random weights) and its criterion, for the 91 classes of COCO."""
    options = Namespace(
        backbone="resnet50",
        dilation=dilation,
        position_embedding="sine",
        hidden_dim=256,
        nheads=8,
        enc_layers=6,
        dec_layers=6,
        dim_feedforward=2048,
        dropout=dropout,
        num_queries=100,
        pre_norm=False,
        masks=masks,
        aux_loss=True,
        lr_backbone=1e-5,
        frozen_weights=None,
        dataset_file="coco",
        device=device,
        set_cost_class=1,
        set_cost_bbox=5,
        set_cost_giou=2,
        bbox_loss_coef=5,
        giou_loss_coef=2,
        mask_loss_coef=1,
        dice_loss_coef=1,
        eos_coef=0.1,
    )
    models = _models()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision: `pretrained` is deprecated
        model, criterion, _ = models.build_model(options)
    return model.to(device), criterion


def nested(images: Any, padding: Any) -> Any:
    """Return the original's padded batch."""
    return _import("util.misc").NestedTensor(images, padding)


def training_loader(coco: Path, batch_size: int, workers: int) -> Any:
    """Return the original's training set and loader over a COCO folder, as its main.py makes them."""
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler

    options = Namespace(coco_path=str(coco), masks=False, dataset_file="coco")
    dataset = _import("datasets.coco").build("train", options)
    sampler = BatchSampler(RandomSampler(dataset), batch_size, drop_last=True)
    collate = _import("util.misc").collate_fn
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers)


def _models() -> Any:
    models = _import("models")
    # It would download ImageNet weights on the main process; the bench needs none.
    _import("models.backbone").is_main_process = lambda: False
    return models


def _import(name: str) -> Any:
    folder = os.environ[VARIABLE]
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)
