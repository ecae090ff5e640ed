"""A sanity check of data and pipeline: overfit a few real images.

ResNet-18 from random weights, all of it trainable, with GroupNorm (frozen BatchNorm over random weights cannot work), at
most 288 px, no augmentation. It is evaluated on the training images: point `--data.train` and `--data.val` at the same
shards. The options of the demo let it converge in minutes on two CPU cores.
"""

from __future__ import annotations

from dataclasses import replace

from detr.config import LossConfig, TransformConfig
from pipeline.config import CheckpointConfig, ClusterConfig, EvaluateConfig, OptimConfig, RunConfig, TrackConfig
from pipeline.recipes.demo import DEMO, as_deformable

OVERFIT = RunConfig(
    recipe="overfit",
    model=replace(
        DEMO.model,
        backbone="resnet18",
        norm="group",
        backbone_weights="random",
        frozen_stages=0,
        hidden_dim=128,
        heads=8,
        feedforward_dim=512,
        num_queries=49,
    ),
    loss=LossConfig(cost_class=2.0, weight_ce=2.0),
    transform=TransformConfig(train_scales=(256,), max_size=288, eval_size=256, flip=0.0, crop=False),
    optim=OptimConfig(
        batch_size=8, epochs=260, lr=5e-4, lr_backbone=5e-4, decay="linear", decay_epoch=130, decay_factor=0.05
    ),
    evaluate=EvaluateConfig(every=20, batch_size=4),
    checkpoint=CheckpointConfig(every_steps=0),
    cluster=ClusterConfig(workers=2),
    track=TrackConfig(log_every=10),
)

# The same check with Deformable DETR, in half the steps.
OVERFIT_DEFORMABLE = replace(
    OVERFIT,
    recipe="overfit-deformable",
    model=replace(as_deformable(OVERFIT.model), num_queries=50),
    optim=replace(OVERFIT.optim, epochs=130, decay_epoch=65),
    evaluate=replace(OVERFIT.evaluate, every=10),
)
