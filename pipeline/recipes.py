"""Named configurations. A recipe is a `RunConfig`; any field can be overridden by a flag (`--optim.lr 2e-4`).

The `detr-*` recipes are the paper's, with the original's defaults: AdamW 1e-4 and 1e-5, weight decay 1e-4, clip 0.1,
300 epochs, drop at 200, global batch 64. `demo` and `overfit` depart from the paper; the comments beside them say how.

**Learning rate and batch.** The batch is global: 64 images per step for any number of workers. The learning rates are
therefore the paper's on 1, 8, 16 or 64 GPUs, and no recipe scales them by that number. They change only with the batch
size: by the square root of the ratio of batch sizes (Malladi et al., 2022; their rule also changes betas and epsilon,
which are left alone here), with a warm-up. `NOTES` states this for each recipe that is made for a cluster size.
"""

from __future__ import annotations

from dataclasses import replace

from detr.config import DeformableConfig, LossConfig, ModelConfig, TransformConfig
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

# Half the epochs, drop at 100: AP 39.5 for half the compute.
DETR_R50_150EP = replace(DETR_R50, recipe="detr-r50-150ep", optim=replace(DETR_R50.optim, epochs=150, decay_epoch=100))

# The paper's run on clusters of three sizes. The images of each step and the result do not depend on the size; the time
# does. All use fp32: bf16 (`--compute.precision bf16`) is faster, but no full training has been done with it. Workers
# need GPUs, so that a cluster without them is refused instead of training for months. Four reader threads are enough:
# an image takes 4.5 ms of a core (BENCHMARKS.md). MLflow's `step_share/data_wait` shows if they are not.
_NODE = ClusterConfig(workers=8, gpu="yes", cpus_per_worker=4)

# One node: 8 images per GPU. The original reports almost 6 days on V100s. A failure costs at most five minutes.
DETR_R50_8GPU = replace(DETR_R50, recipe="detr-r50-8gpu", checkpoint=CheckpointConfig(every_minutes=5.0), cluster=_NODE)

# Two nodes, as in the paper: 4 images per GPU (section 4: 16 V100, 3 days). Steps wait for the network between nodes.
DETR_R50_16GPU = replace(DETR_R50_8GPU, recipe="detr-r50-16gpu", cluster=replace(_NODE, workers=16, max_failures=10))

# Eight nodes. One image per GPU needs no padding, but every step sums 166 MB of gradients over 64 GPUs for 64 images.
# 64 workers fail often, so more failures are allowed. Steps are short, so a failure between checkpoints that are twice
# as many steps apart costs no more time.
DETR_R50_64GPU = replace(
    DETR_R50,
    recipe="detr-r50-64gpu",
    checkpoint=CheckpointConfig(every_steps=1000, every_minutes=5.0),
    cluster=replace(_NODE, workers=64, max_failures=100),
)

# The same cluster with enough work for its GPUs: 256 = 64 x 4, so a quarter of the steps. Both learning rates are twice
# the paper's, sqrt(256 / 64), reached over the first 2 epochs (924 steps). UNTRIED: AP may be lower than the paper's.
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
"""Facts about recipes, as `detr show` prints them: batch and learning rates for a cluster size, published figures."""

# Deformable DETR (Zhu et al., 2021): batch 32, 2e-4, 50 epochs, drop at 40. The figures are those of its authors' README.
_AS_DEFORMABLE = OptimConfig(batch_size=32, epochs=50, lr=2e-4, lr_backbone=2e-5, decay_epoch=40)
DEFORMABLE_R50 = replace(
    DETR_R50,
    recipe="deformable-r50-50ep",
    model=ModelConfig(variant="deformable", num_queries=300, feedforward_dim=1024),
    loss=LossConfig(cost_class=2.0, weight_ce=2.0),
    optim=_AS_DEFORMABLE,
)
_REFINE, _TWO_STAGE = DeformableConfig(box_refine=True), DeformableConfig(box_refine=True, two_stage=True)
DEFORMABLE_R50_REFINE = replace(
    DEFORMABLE_R50, recipe="deformable-r50-refine-50ep", model=replace(DEFORMABLE_R50.model, deformable=_REFINE)
)
DEFORMABLE_R50_TWO_STAGE = replace(
    DEFORMABLE_R50, recipe="deformable-r50-two-stage-50ep", model=replace(DEFORMABLE_R50.model, deformable=_TWO_STAGE)
)

# As the authors of H-DETR (Jia et al., 2023) trained it in 12 epochs: wider feed-forward networks, drop at 11.
DEFORMABLE_R50_12EP = replace(
    DEFORMABLE_R50_TWO_STAGE,
    recipe="deformable-r50-12ep",
    model=replace(DEFORMABLE_R50_TWO_STAGE.model, feedforward_dim=2048),
    optim=replace(_AS_DEFORMABLE, epochs=12, decay_epoch=11),
)
# Their hybrid matching on top: 1500 further queries in training, six for each object, and three "tricks" (no dropout,
# mixed query selection, look forward twice). Training images need 1800 cells, about 290 x 290 px.
H_DEFORMABLE_R50_12EP = replace(
    DEFORMABLE_R50_12EP,
    recipe="h-deformable-r50-12ep",
    model=replace(
        DEFORMABLE_R50_12EP.model,
        dropout=0.0,
        deformable=replace(_TWO_STAGE, mixed_selection=True, look_forward_twice=True, one_to_many_queries=1500),
    ),
)
H_DEFORMABLE_R50_36EP = replace(
    H_DEFORMABLE_R50_12EP,
    recipe="h-deformable-r50-36ep",
    optim=replace(_AS_DEFORMABLE, epochs=36, decay_epoch=30),
)

# Conditional DETR (Meng et al., 2021) as its authors trained it: DETR's rates and augmentation, 50 epochs, drop at 40,
# batches of 16 images.
CONDITIONAL_R50 = replace(
    DETR_R50,
    recipe="conditional-r50-50ep",
    model=ModelConfig(variant="conditional", num_queries=300),
    loss=LossConfig(cost_class=2.0, weight_ce=2.0),
    optim=replace(DETR_R50.optim, batch_size=16, epochs=50, decay_epoch=40),
)

_BY_ITS_AUTHORS = "on COCO val by its authors' README; this code has not been trained that long"
NOTES |= {
    "deformable-r50-50ep": f"Deformable DETR: AP 44.5 {_BY_ITS_AUTHORS}",
    "deformable-r50-refine-50ep": f"Deformable DETR with box refinement: AP 46.2 {_BY_ITS_AUTHORS}",
    "deformable-r50-two-stage-50ep": f"Deformable DETR with box refinement and two stages: AP 46.9 {_BY_ITS_AUTHORS}",
    "deformable-r50-12ep": f"Deformable DETR with two stages in 12 epochs: AP 43.7 {_BY_ITS_AUTHORS} (H-DETR's)",
    "conditional-r50-50ep": f"Conditional DETR: AP 41.0 {_BY_ITS_AUTHORS}",
    "h-deformable-r50-12ep": f"Deformable DETR with hybrid matching in 12 epochs: AP 48.7 {_BY_ITS_AUTHORS}",
    "h-deformable-r50-36ep": f"Deformable DETR with hybrid matching in 36 epochs: AP 50.0 {_BY_ITS_AUTHORS}",
}

# The mask head on top of a trained, frozen detector (`--initial`; section 4.4): 25 epochs, drop at 15.
DETR_R50_MASKS = replace(
    DETR_R50,
    recipe="detr-r50-masks",
    model=replace(DETR_R50.model, masks=True),
    optim=replace(DETR_R50.optim, epochs=25, decay_epoch=15, train="mask_head"),
)

# Panoptic segmentation in two steps, as the original trains it on one node of 8 GPUs with 2 images each: boxes of things
# and stuff for 300 epochs, then the mask head on that detector, frozen (`--initial`), for 25 epochs.
DETR_R50_PANOPTIC_BOXES = replace(
    DETR_R50, recipe="detr-r50-panoptic-boxes", optim=replace(DETR_R50.optim, batch_size=16)
)
DETR_R50_PANOPTIC = replace(
    DETR_R50_PANOPTIC_BOXES,
    recipe="detr-r50-panoptic",
    model=replace(DETR_R50.model, masks=True),
    optim=replace(DETR_R50_PANOPTIC_BOXES.optim, epochs=25, decay_epoch=15, train="mask_head"),
)


def _panoptic(name: str, model: ModelConfig) -> tuple[RunConfig, RunConfig]:
    """Return both steps for another backbone."""
    boxes = replace(DETR_R50_PANOPTIC_BOXES, recipe=f"{name}-panoptic-boxes", model=model)
    return boxes, replace(DETR_R50_PANOPTIC, recipe=f"{name}-panoptic", model=replace(model, masks=True))


_MORE_PANOPTIC = (
    *_panoptic("detr-r50-dc5", DETR_R50_DC5.model),
    *_panoptic("detr-r101", DETR_R101.model),
    *_panoptic("detr-r101-dc5", DETR_R101_DC5.model),
)
_BOXES_FIRST = "on COCO panoptic val by the original's README, after the boxes of {}-panoptic-boxes; {}"
NOTES |= {
    f"{name}-panoptic": f"panoptic, masks: PQ {pq}, AP of boxes {box_ap}, of masks {mask_ap} "
    + _BOXES_FIRST.format(name, "this code has not been trained that long")
    for name, pq, box_ap, mask_ap in (
        ("detr-r50", 43.4, 38.8, 31.1),
        ("detr-r50-dc5", 44.6, 40.2, 31.9),
        ("detr-r101", 45.1, 40.1, 33.0),
    )
}
NOTES |= {
    "detr-r101-dc5-panoptic": "panoptic, masks: no figure is published; after detr-r101-dc5-panoptic-boxes",
    **{
        f"{name}-panoptic-boxes": f"panoptic, boxes of things and stuff (data of `detr shard coco-panoptic`), before {name}-panoptic"
        for name in ("detr-r50", "detr-r50-dc5", "detr-r101", "detr-r101-dc5")
    },
}

# Any COCO-format data from a trained model (`--initial`): a tenth of the learning rate, 50 epochs, drop at 40.
# The architecture comes from that model; a class head for other classes is replaced, with a message.
FINETUNE = replace(
    DETR_R50,
    recipe="finetune",
    cluster=ClusterConfig(workers=1),
    optim=replace(DETR_R50.optim, batch_size=16, epochs=50, lr=1e-5, lr_backbone=1e-6, decay_epoch=40),
)

# The built-in demonstration: 4,000 images of 96 px, four classes, minutes on two CPU cores. The backbone comes from
# `pipeline.built_in.pretrain` instead of ImageNet; as in the paper, its batch norm, stem and first stage are frozen.
# The departures let a DETR converge in 3,000 steps: pre-norm, no dropout, attention and queries that start local. A
# worker trains with one thread, so two workers use two cores.
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
    # Few queries and a short training: "no object" gets more weight, because an image has 13 such queries for 3 objects
    # (in the paper 93 for 7), and classes count twice. After 6 epochs AP is 0.40; with the paper's weights it is 0.33.
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

# The demonstration with Deformable DETR, in half the epochs: levels of stride 8, 16 and 32, together 189 cells.
DEMO_DEFORMABLE = replace(
    DEMO,
    recipe="demo-deformable",
    model=replace(
        DEMO.model,
        variant="deformable",
        deformable=replace(_TWO_STAGE, levels=3, mixed_selection=True, look_forward_twice=True),
        pre_norm=False,
        position_at_input=False,
        decoder_input="zeros",
        query_init="normal",
        tied_attention_init=False,
    ),
    loss=LossConfig(cost_class=2.0, weight_ce=2.0),
    optim=replace(DEMO.optim, epochs=6),
)

# A few hundred images of one's own on a laptop: the demo's backbone, which needs no download, under a Deformable DETR.
# `pipeline.data.small` replaces queries, sizes, batch, rates and epochs by what suits the data; the values here are those
# for 200 photographs with up to 20 objects.
SMALL = replace(
    DEMO_DEFORMABLE,
    recipe="small",
    model=replace(DEMO_DEFORMABLE.model, num_queries=30),
    transform=TransformConfig(train_scales=(160, 176, 192, 208), max_size=320, eval_size=192, crop=False),
    data=DataConfig(reader_threads=1),
    optim=replace(
        DEMO.optim, batch_size=8, epochs=35, lr=7.1e-4, lr_backbone=3.55e-4, decay_epoch=11, warmup_epochs=3.5
    ),
    evaluate=EvaluateConfig(every=4, batch_size=25),
)
NOTES["small"] = (
    "small: for a few hundred images of your own, on a laptop. With --data.train it chooses sizes, queries, batch, rates and "
    "epochs by the data, as listed; a flag of yours stays. Backbone: the built-in demo's, pre-trained at the first use without "
    "a download, or torchvision's with --model.backbone resnet18 --model.backbone-weights imagenet"
)

# The demonstration of panoptic segmentation: the same shapes as things, on three kinds of stuff. Boxes and masks are
# trained together, in one run; a mask head needs 128 channels and 8 heads.
DEMO_PANOPTIC = replace(
    DEMO,
    recipe="demo-panoptic",
    model=replace(
        DEMO.model, backbone_weights="runs/demo-panoptic/backbone.safetensors", hidden_dim=128, heads=8, masks=True
    ),
    data=replace(
        DEMO.data, train="runs/demo-panoptic/data/train", val="runs/demo-panoptic/data/val", built_in_stuff=True
    ),
    optim=replace(DEMO.optim, epochs=6),
    evaluate=replace(DEMO.evaluate, every=1),
)

# A sanity check of data and pipeline: overfit a few real images. ResNet-18 from random weights, all of it trainable,
# with GroupNorm (frozen BatchNorm over random weights cannot work), at most 288 px, no augmentation. It is evaluated on
# the training images: point `--data.train` and `--data.val` at the same shards. The options of the demo let it converge
# in minutes on two CPU cores.
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
    model=replace(
        DEMO_DEFORMABLE.model,
        backbone="resnet18",
        norm="group",
        backbone_weights="random",
        frozen_stages=0,
        hidden_dim=128,
        heads=8,
        feedforward_dim=512,
        num_queries=50,
    ),
    loss=DEMO_DEFORMABLE.loss,
    optim=replace(OVERFIT.optim, epochs=130, decay_epoch=65),
    evaluate=replace(OVERFIT.evaluate, every=10),
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
        DETR_R50_PANOPTIC_BOXES,
        DETR_R50_PANOPTIC,
        *_MORE_PANOPTIC,
        DEFORMABLE_R50,
        DEFORMABLE_R50_REFINE,
        DEFORMABLE_R50_TWO_STAGE,
        DEFORMABLE_R50_12EP,
        H_DEFORMABLE_R50_12EP,
        H_DEFORMABLE_R50_36EP,
        CONDITIONAL_R50,
        FINETUNE,
        SMALL,
        OVERFIT,
        OVERFIT_DEFORMABLE,
        DEMO,
        DEMO_DEFORMABLE,
        DEMO_PANOPTIC,
    )
}


def uses_built_in(config: RunConfig) -> bool:
    """Return True if a run uses what is made where it is absent: the demo's data, or its backbone."""
    return config.data.built_in or (uses_demo_backbone(config) and config.model.backbone == DEMO.model.backbone)


def uses_demo_backbone(config: RunConfig) -> bool:
    """Return True if a run starts from the weights of the demo's backbone, which no other backbone takes."""
    return config.model.backbone_weights == DEMO.model.backbone_weights and not config.initial
