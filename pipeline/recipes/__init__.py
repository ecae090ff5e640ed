"""Named configurations. A recipe is a `RunConfig`; any field can be overridden by a flag (`--optim.lr 2e-4`).

The `detr-*` recipes are the paper's, with the original's defaults: AdamW 1e-4 and 1e-5, weight decay 1e-4, clip 0.1,
300 epochs, drop at 200, global batch 64. `demo` and `overfit` depart from the paper; the comments beside them say how.

**Learning rate and batch.** The batch is global: 64 images per step for any number of workers. The learning rates are
therefore the paper's on 1, 8, 16 or 64 GPUs, and no recipe scales them by that number. They change only with the batch
size: by the square root of the ratio of batch sizes (Malladi et al., 2022; their rule also changes betas and epsilon,
which are left alone here), with a warm-up. `NOTES` states this for each recipe that is made for a cluster size.

May import `pipeline.config` and `detr.config`; never torch, Ray or MLflow.
"""

from pipeline.config import RunConfig
from pipeline.recipes import cluster_sizes, demo, masks, original, overfit, own_data, variants
from pipeline.recipes.demo import DEMO, uses_built_in, uses_demo_backbone
from pipeline.recipes.original import DETR_R50
from pipeline.recipes.overfit import OVERFIT
from pipeline.recipes.own_data import SMALL

__all__ = ["DEMO", "DETR_R50", "NOTES", "OVERFIT", "RECIPES", "SMALL", "uses_built_in", "uses_demo_backbone"]

RECIPES: dict[str, RunConfig] = {
    config.recipe: config
    for config in (
        original.DETR_R50,
        original.DETR_R50_DC5,
        original.DETR_R101,
        original.DETR_R101_DC5,
        original.DETR_R50_150EP,
        cluster_sizes.DETR_R50_8GPU,
        cluster_sizes.DETR_R50_16GPU,
        cluster_sizes.DETR_R50_64GPU,
        cluster_sizes.DETR_R50_64GPU_B256,
        masks.DETR_R50_MASKS,
        masks.DETR_R50_PANOPTIC_BOXES,
        masks.DETR_R50_PANOPTIC,
        *masks.MORE_PANOPTIC,
        variants.DEFORMABLE_R50,
        variants.DEFORMABLE_R50_REFINE,
        variants.DEFORMABLE_R50_TWO_STAGE,
        variants.DEFORMABLE_R50_12EP,
        variants.H_DEFORMABLE_R50_12EP,
        variants.H_DEFORMABLE_R50_36EP,
        variants.CONDITIONAL_R50,
        own_data.FINETUNE,
        own_data.SMALL,
        overfit.OVERFIT,
        overfit.OVERFIT_DEFORMABLE,
        demo.DEMO,
        demo.DEMO_DEFORMABLE,
        demo.DEMO_PANOPTIC,
    )
}

NOTES: dict[str, str] = cluster_sizes.NOTES | variants.NOTES | masks.NOTES | own_data.NOTES
"""Facts about recipes, as `detr show` prints them: batch and learning rates for a cluster size, published figures."""
