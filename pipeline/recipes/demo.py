"""The built-in demonstrations: DETR, Deformable DETR and panoptic segmentation."""

from __future__ import annotations

from dataclasses import replace

from detr.config import DeformableConfig, LossConfig, ModelConfig, TransformConfig
from pipeline.config import ClusterConfig, DataConfig, EvaluateConfig, OptimConfig, RunConfig

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


def as_deformable(model: ModelConfig) -> ModelConfig:
    """Return a small DETR as a Deformable DETR, which needs no departures: levels of stride 8, 16 and 32, two stages."""
    return replace(
        model,
        variant="deformable",
        deformable=DeformableConfig(
            levels=3, box_refine=True, two_stage=True, mixed_selection=True, look_forward_twice=True
        ),
        pre_norm=False,
        position_at_input=False,
        decoder_input="zeros",
        query_init="normal",
        tied_attention_init=False,
    )


# The demonstration with Deformable DETR, in half the epochs; its levels have 189 cells together.
DEMO_DEFORMABLE = replace(
    DEMO,
    recipe="demo-deformable",
    model=as_deformable(DEMO.model),
    loss=LossConfig(cost_class=2.0, weight_ce=2.0),
    optim=replace(DEMO.optim, epochs=6),
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


def uses_built_in(config: RunConfig) -> bool:
    """Return True if a run uses what is made where it is absent: the demo's data, or its backbone."""
    return config.data.built_in or (uses_demo_backbone(config) and config.model.backbone == DEMO.model.backbone)


def uses_demo_backbone(config: RunConfig) -> bool:
    """Return True if a run starts from the weights of the demo's backbone, which no other backbone takes."""
    return config.model.backbone_weights == DEMO.model.backbone_weights and not config.initial
