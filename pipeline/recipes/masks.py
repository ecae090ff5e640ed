"""The mask head on a trained detector: instance and panoptic segmentation."""

from __future__ import annotations

from dataclasses import replace

from detr.config import ModelConfig
from pipeline.config import RunConfig
from pipeline.recipes.original import DETR_R50, DETR_R50_DC5, DETR_R101, DETR_R101_DC5

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


MORE_PANOPTIC = (
    *_panoptic("detr-r50-dc5", DETR_R50_DC5.model),
    *_panoptic("detr-r101", DETR_R101.model),
    *_panoptic("detr-r101-dc5", DETR_R101_DC5.model),
)

NOTES = {
    f"{name}-panoptic": f"panoptic, masks: PQ {pq}, AP of boxes {box_ap}, of masks {mask_ap} on COCO panoptic val by the "
    f"original's README, after the boxes of {name}-panoptic-boxes; this code has not been trained that long"
    for name, pq, box_ap, mask_ap in (
        ("detr-r50", 43.4, 38.8, 31.1),
        ("detr-r50-dc5", 44.6, 40.2, 31.9),
        ("detr-r101", 45.1, 40.1, 33.0),
    )
} | {
    "detr-r101-dc5-panoptic": "panoptic, masks: no figure is published; after detr-r101-dc5-panoptic-boxes",
    **{
        f"{name}-panoptic-boxes": f"panoptic, boxes of things and stuff (data of `detr shard coco-panoptic`), before {name}-panoptic"
        for name in ("detr-r50", "detr-r50-dc5", "detr-r101", "detr-r101-dc5")
    },
}
