"""The paper's run on clusters of three sizes.

The images of each step and the result do not depend on the size; the time does. All use fp32: bf16
(`--compute.precision bf16`) is faster, but no full training has been done with it. Workers need GPUs, so that a cluster
without them is refused instead of training for months. Four reader threads are enough: an image takes 4.5 ms of a core
(BENCHMARKS.md). MLflow's `step_share/data_wait` shows if they are not.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.config import CheckpointConfig, ClusterConfig
from pipeline.recipes.original import DETR_R50

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
NOTES = {
    "detr-r50-8gpu": f"one node of 8 GPUs, 64 = 8 x 8: {_AS_THE_PAPER}",
    "detr-r50-16gpu": f"16 GPUs, 64 = 16 x 4, as in the paper: {_AS_THE_PAPER}",
    "detr-r50-64gpu": f"64 GPUs, 64 = 64 x 1: {_AS_THE_PAPER}",
    "detr-r50-64gpu-b256": (
        "64 GPUs, 256 = 64 x 4: four times the paper's batch, so both learning rates times sqrt(4) = 2 (2e-4, backbone "
        "2e-5), with a warm-up of 2 epochs; UNTRIED, its AP is not known"
    ),
}
