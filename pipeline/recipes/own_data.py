"""Data of the user's own: from a trained model, or a few hundred images on a laptop."""

from __future__ import annotations

from dataclasses import replace

from detr.config import TransformConfig
from pipeline.config import ClusterConfig, DataConfig, EvaluateConfig
from pipeline.recipes.demo import DEMO, DEMO_DEFORMABLE
from pipeline.recipes.original import DETR_R50

# Any COCO-format data from a trained model (`--initial`): a tenth of the learning rate, 50 epochs, drop at 40.
# The architecture comes from that model; a class head for other classes is replaced, with a message.
FINETUNE = replace(
    DETR_R50,
    recipe="finetune",
    cluster=ClusterConfig(workers=1),
    optim=replace(DETR_R50.optim, batch_size=16, epochs=50, lr=1e-5, lr_backbone=1e-6, decay_epoch=40),
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

NOTES = {
    "small": (
        "small: for a few hundred images of your own, on a laptop. With --data.train it chooses sizes, queries, batch, rates and "
        "epochs by the data, as listed; a flag of yours stays. Backbone: the built-in demo's, pre-trained at the first use without "
        "a download, or torchvision's with --model.backbone resnet18 --model.backbone-weights imagenet"
    )
}
