"""Deformable DETR, hybrid matching and Conditional DETR as their authors trained them, for 12 to 50 epochs."""

from __future__ import annotations

from dataclasses import replace

from detr.config import DeformableConfig, LossConfig, ModelConfig
from pipeline.config import OptimConfig
from pipeline.recipes.original import DETR_R50

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
NOTES = {
    "deformable-r50-50ep": f"Deformable DETR: AP 44.5 {_BY_ITS_AUTHORS}",
    "deformable-r50-refine-50ep": f"Deformable DETR with box refinement: AP 46.2 {_BY_ITS_AUTHORS}",
    "deformable-r50-two-stage-50ep": f"Deformable DETR with box refinement and two stages: AP 46.9 {_BY_ITS_AUTHORS}",
    "deformable-r50-12ep": f"Deformable DETR with two stages in 12 epochs: AP 43.7 {_BY_ITS_AUTHORS} (H-DETR's)",
    "conditional-r50-50ep": f"Conditional DETR: AP 41.0 {_BY_ITS_AUTHORS}",
    "h-deformable-r50-12ep": f"Deformable DETR with hybrid matching in 12 epochs: AP 48.7 {_BY_ITS_AUTHORS}",
    "h-deformable-r50-36ep": f"Deformable DETR with hybrid matching in 36 epochs: AP 50.0 {_BY_ITS_AUTHORS}",
}
