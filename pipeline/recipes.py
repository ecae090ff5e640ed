"""Named runs. A recipe is a `RunConfig`; any field is overridden on the command line (`--optim.lr 2e-4`).

The `detr-*` recipes are the paper's, every default the original's: AdamW 1e-4 and 1e-5, weight decay 1e-4, clip 0.1,
300 epochs, drop at 200, global batch 64. `demo`, `overfit` and their model options depart from the paper and say so.

**Learning rate and batch.** The batch is global: 64 images per step, whatever the number of workers, so the rates stay the
paper's on 1, 8, 16 or 64 GPUs and no recipe scales them by that number. Only where the batch itself is another do they
change: AdamW's by the square root of the ratio of batches (Malladi et al., 2022, whose rule also changes betas and
epsilon, which are left as they are here), with a warm-up. `NOTES` says it of each recipe that is about a cluster's size.
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

# The paper's run on clusters of three sizes. Which images a step holds and what is learned from them does not depend on the
# size; how quickly does. All are fp32: bf16 (`--compute.precision bf16`) is quicker and has not been tried to the end.
# Workers need GPUs, so that a cluster without them is refused instead of taking months. Four reading threads are ample: an
# image takes 4.5 ms of a core (BENCHMARKS.md); MLflow's `step_share/data_wait` says whether that holds.
_NODE = ClusterConfig(workers=8, gpu="yes", cpus_per_worker=4)

# One node: 8 images to a GPU. The original says of such a run on V100s: almost 6 days. A kill costs five minutes of them.
DETR_R50_8GPU = replace(DETR_R50, recipe="detr-r50-8gpu", checkpoint=CheckpointConfig(every_minutes=5.0), cluster=_NODE)

# Two nodes, the paper's own: 4 images to a GPU (section 4: 16 V100, 3 days). Steps wait for the network between nodes.
DETR_R50_16GPU = replace(DETR_R50_8GPU, recipe="detr-r50-16gpu", cluster=replace(_NODE, workers=16, max_failures=10))

# Eight nodes. One image to a GPU pads nothing, but every step adds up 166 MB of gradients over 64 GPUs for 64 images.
# Whoever restarts 64 workers meets failures often: more of them are allowed. Steps are quick, so twice as many of them
# between checkpoints cost no more time.
DETR_R50_64GPU = replace(
    DETR_R50,
    recipe="detr-r50-64gpu",
    checkpoint=CheckpointConfig(every_steps=1000, every_minutes=5.0),
    cluster=replace(_NODE, workers=64, max_failures=100),
)

# The same cluster with work for its GPUs: 256 = 64 x 4. Both rates twice the paper's, sqrt(256 / 64), reached over the
# first 2 epochs (924 steps). A quarter of the steps. UNTRIED: no figure is known, and AP may be lower than the paper's.
DETR_R50_64GPU_B256 = replace(
    DETR_R50_64GPU,
    recipe="detr-r50-64gpu-b256",
    optim=replace(DETR_R50.optim, batch_size=256, lr=2e-4, lr_backbone=2e-5, warmup_epochs=2.0),
    checkpoint=CheckpointConfig(every_steps=250, every_minutes=5.0),
)

_AS_THE_PAPER = "the batch is global, so it and both learning rates are the paper's (64; 1e-4, backbone 1e-5)"
NOTES: dict[str, str] = {
    "detr-r50-8gpu": f"one node of 8 GPUs, 64 = 8 x 8: {_AS_THE_PAPER}",
    "detr-r50-16gpu": f"16 GPUs, 64 = 16 x 4, as in the paper: {_AS_THE_PAPER}",
    "detr-r50-64gpu": f"64 GPUs, 64 = 64 x 1: {_AS_THE_PAPER}",
    "detr-r50-64gpu-b256": (
        "64 GPUs, 256 = 64 x 4: four times the paper's batch, so both learning rates times sqrt(4) = 2 (2e-4, backbone "
        "2e-5), with a warm-up of 2 epochs; UNTRIED, its AP is not known"
    ),
}
"""How learning rate and batch are treated, of the recipes that are made for a cluster's size; `detr show` says it."""

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
        DETR_R50_8GPU,
        DETR_R50_16GPU,
        DETR_R50_64GPU,
        DETR_R50_64GPU_B256,
        DETR_R50_MASKS,
        FINETUNE,
        OVERFIT,
        DEMO,
    )
}
