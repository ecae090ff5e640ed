"""Named runs. A recipe is a `RunConfig`; any field is overridden on the command line (`--optim.lr 2e-4`).

The `detr-*` recipes are the paper's, every default the original's: AdamW 1e-4 and 1e-5, weight decay 1e-4, clip 0.1,
300 epochs, drop at 200, global batch 64. `demo`, `overfit` and their model options depart from the paper and say so.
"""

from __future__ import annotations

from dataclasses import replace

from detr.config import LossConfig, ModelConfig, TransformConfig
from pipeline.config import (
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    EvaluateConfig,
    OptimConfig,
    RunConfig,
    TrackConfig,
)

# The paper's R50: COCO val AP 40.6 after 300 epochs (42.0 after 500).
DETR_R50 = RunConfig(recipe="detr-r50", data=DataConfig(reader_threads=4), cluster=ClusterConfig(workers=8))

# DC5 dilates the last stage: stride 16, twice the resolution for small objects, about twice the compute.
DETR_R50_DC5 = replace(DETR_R50, recipe="detr-r50-dc5", model=replace(DETR_R50.model, dilation=True))
DETR_R101 = replace(DETR_R50, recipe="detr-r101", model=replace(DETR_R50.model, backbone="resnet101"))
DETR_R101_DC5 = replace(DETR_R101, recipe="detr-r101-dc5", model=replace(DETR_R101.model, dilation=True))

# Half the epochs, drop at 100: AP 39.5 for half the bill.
DETR_R50_150EP = replace(DETR_R50, recipe="detr-r50-150ep", optim=replace(DETR_R50.optim, epochs=150, decay_epoch=100))

# The mask head on top of a trained detector (`--initial`), which stays as it is (section 4.4): 25 epochs, drop at 15.
DETR_R50_MASKS = replace(
    DETR_R50,
    recipe="detr-r50-masks",
    model=replace(DETR_R50.model, masks=True),
    optim=replace(DETR_R50.optim, epochs=25, decay_epoch=15, train="mask_head"),
)

# Any COCO-format data from a checkpoint (`--initial`): a tenth of the learning rate, 50 epochs, drop at 40.
# The model's shape comes from the checkpoint; a class head of other classes is replaced, and that is said.
FINETUNE = replace(
    DETR_R50,
    recipe="finetune",
    cluster=ClusterConfig(workers=1),
    optim=replace(DETR_R50.optim, batch_size=16, epochs=50, lr=1e-5, lr_backbone=1e-6, decay_epoch=40),
)

# The built-in demonstration: 4,000 images of 96 px, four classes, minutes on two CPU cores. The backbone comes from
# `pipeline.pretrain`, which stands where ImageNet weights stand; as in the paper its batch norm, stem and first stage
# are frozen. The departures make a DETR converge in 3,000 steps: pre-norm, no dropout, attention and queries that start
# local. A worker trains with one thread, so two of them fill two cores.
DEMO = RunConfig(
    recipe="demo",
    model=ModelConfig(
        backbone="tiny",
        backbone_weights="runs/demo/backbone.safetensors",
        hidden_dim=64,
        heads=4,
        encoder_layers=2,
        decoder_layers=3,
        feedforward_dim=256,
        dropout=0.0,
        num_queries=16,
        pre_norm=True,
        position_temperature=20.0,
        position_at_input=True,
        decoder_input="queries",
        query_init="grid",
        tied_attention_init=True,
    ),
    # Few queries and short training: no object weighs more, because 13 such queries stand against 3 objects (the paper's
    # 93 against 7), and classes count twice. After 6 epochs AP is 0.40, with the paper's weights 0.33.
    loss=LossConfig(cost_class=2.0, weight_ce=2.0, eos_coef=0.4),
    transform=TransformConfig(train_scales=(96,), max_size=96, eval_size=96, crop=False),
    data=DataConfig(train="runs/demo/data/train", val="runs/demo/data/val", built_in=True, reader_threads=1),
    optim=OptimConfig(
        batch_size=16,
        epochs=12,
        lr=1e-3,
        lr_backbone=5e-4,
        decay="linear",
        decay_epoch=2,
        decay_factor=0.01,
        warmup_epochs=0.4,
    ),
    evaluate=EvaluateConfig(every=3, batch_size=25),
    cluster=ClusterConfig(workers=2, gpu="no"),
)

# A sanity check of data and pipeline on a handful of real images: can they be learned by heart? ResNet-18 from random
# weights, all of it trainable, with GroupNorm (frozen BatchNorm over random weights cannot work), at most 288 px, no
# augmentation, evaluated on the images it was trained on: point `--data.train` and `--data.val` at the same shards.
# The options of the demo make it converge in minutes on two CPU cores.
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

RECIPES: dict[str, RunConfig] = {
    config.recipe: config
    for config in (
        DETR_R50,
        DETR_R50_DC5,
        DETR_R101,
        DETR_R101_DC5,
        DETR_R50_150EP,
        DETR_R50_MASKS,
        FINETUNE,
        OVERFIT,
        DEMO,
    )
}
