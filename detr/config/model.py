"""Configuration of the model."""

import math
from dataclasses import dataclass, field
from typing import Literal

from detr.config.checks import check_literals, require, require_each

GROUPS = 32
"""Number of groups of the group norm after each projection of a feature level in Deformable DETR."""


@dataclass(frozen=True)
class DeformableConfig:
    """Options of Deformable DETR and of hybrid matching, used with `variant` deformable only. Defaults: the paper's."""

    levels: int = 4
    """Number of feature levels.
    1: the last stage of the backbone. 3 or more: its stages of stride 8, 16 and 32, and further ones at half the size."""
    encoder_points: int = 4
    """Number of sampled points per head and level in the encoder."""
    decoder_points: int = 4
    """Number of sampled points per head and level in the decoder."""
    box_refine: bool = False
    """Let each decoder layer refine the boxes of the layer before."""
    two_stage: bool = False
    """Take the boxes of the encoder's best cells as the first boxes of the queries. Needs `box_refine`."""
    mixed_selection: bool = False
    """Learn the content of the queries, and take only their positions from the encoder. Needs `two_stage`."""
    look_forward_twice: bool = False
    """Let the loss of a box train the layer before, too. Needs `box_refine`."""
    one_to_many_queries: int = 0
    """Number of further queries in training, several of which match each object (hybrid matching; 1500 in its paper).
    0: none. Inference does not use them."""

    def __post_init__(self) -> None:
        require(self.levels == 1 or self.levels >= 3, "deformable.levels", self.levels, "1, or 3 or more")
        require_each(self, "encoder_points decoder_points", 1, "at least 1")
        require_each(self, "one_to_many_queries", 0, "0 or more")
        refine, stages = "True with {}", "add box_refine"
        require(
            self.box_refine or not self.two_stage, "deformable.box_refine", False, refine.format("two_stage"), stages
        )
        needs = refine.format("look_forward_twice")
        require(self.box_refine or not self.look_forward_twice, "deformable.box_refine", False, needs, stages)
        needs = "True with mixed_selection"
        require(self.two_stage or not self.mixed_selection, "deformable.two_stage", False, needs, "add two_stage")


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of the model. The defaults are the paper's R50; the number of classes comes from the data."""

    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101", "tiny"] = "resnet50"
    """Backbone network.
    resnet50 and resnet101 are the paper's; resnet18 and resnet34 are smaller; tiny is for images of about 100 px."""
    norm: Literal["frozen_batch", "batch", "group"] = "frozen_batch"
    """Normalisation layers of the backbone.
    frozen_batch: fixed statistics, as in the paper; needs pre-trained weights.
    batch: trainable, one worker only.
    group: trainable, any number of workers. Use batch or group if the backbone starts from random weights."""
    backbone_weights: str = "imagenet"
    """Initial weights of the backbone.
    imagenet: torchvision's.
    random: start untrained.
    Otherwise the path of a state dict."""
    dilation: bool = False
    """Dilate the last stage of the backbone instead of striding it (DC5): stride 16 instead of 32.
    Better on small objects, about twice the compute. Needs resnet50 or resnet101."""
    frozen_stages: int = 2
    """Number of backbone stages that are not trained.
    0: none. 1: the stem. 2: the stem and layer1, as in the paper. 5: all.
    Use 0 with random weights."""
    position: Literal["sine", "learned"] = "sine"
    """Position encoding.
    sine: fixed, for any image size, as in the paper.
    learned: trained, 50 x 50 cells, stretched over larger feature maps."""
    hidden_dim: int = 256
    """Number of channels of the transformer, a multiple of `heads` and of 4."""
    heads: int = 8
    """Number of attention heads."""
    encoder_layers: int = 6
    """Number of encoder layers. 0: no encoder."""
    decoder_layers: int = 6
    """Number of decoder layers, at least 1."""
    feedforward_dim: int = 2048
    """Number of hidden units of the feed-forward networks in the transformer."""
    dropout: float = 0.1
    """Dropout probability of the transformer in training, 0 to below 1. 0: none."""
    num_queries: int = 100
    """Number of object queries, the maximum number of objects found per image.
    Set it well above the largest number of objects in one of your images."""
    pre_norm: bool = False
    """Normalise before attention and feed-forward instead of after, as in the original's --pre_norm.
    The paper normalises after; before can be easier to train."""
    auxiliary: bool = True
    """Return the predictions of every decoder layer, not only of the last. `loss.auxiliary` needs them."""
    masks: bool = False
    """Add the mask head for instance segmentation (section 4.4 of the paper).
    The data must hold segmentations, and `hidden_dim` must be a multiple of 128 and `heads` of 8."""
    position_temperature: float = 10000.0
    """Temperature of the sine position encoding, above 1. Lower it, such as to 20, for images of few cells.
    10000 in the paper."""
    position_at_input: bool = False
    """Add the position encoding to the encoder's input too, not only to queries and keys of its layers.
    Not in the paper."""
    decoder_input: Literal["zeros", "queries"] = "zeros"
    """Input of the first decoder layer.
    zeros: as in the paper.
    queries: the query embeddings, which helps short trainings."""
    query_init: Literal["normal", "grid"] = "normal"
    """Initial query embeddings.
    normal: random, as in the paper.
    grid: positions of a square grid, which helps short trainings; `num_queries` must be a square number."""
    tied_attention_init: bool = False
    """Start with equal query and key projections, so that attention is local at first.
    Not in the paper; helps short trainings."""
    variant: Literal["detr", "deformable", "conditional"] = "detr"
    """Kind of model.
    detr: the paper's.
    conditional: Conditional DETR, which converges in 50 epochs; the recipe `conditional-r50-50ep` has its other options.
    deformable: Deformable DETR, which converges in 12 to 50 epochs; the recipes `deformable-*` have its other options."""
    deformable: DeformableConfig = field(default_factory=DeformableConfig)

    def __post_init__(self) -> None:
        check_literals(self, require)
        require(bool(self.backbone_weights), "backbone_weights", "", "imagenet, random or the path of a state dict")
        require_each(self, "hidden_dim heads decoder_layers feedforward_dim num_queries", 1, "at least 1")
        require_each(self, "encoder_layers", 0, "0 or more")
        require(0 <= self.frozen_stages <= 5, "frozen_stages", self.frozen_stages, "0 (none) to 5 (all)")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "at least 0 and below 1")
        require(self.position_temperature > 1, "position_temperature", self.position_temperature, "above 1")
        require(self.hidden_dim % self.heads == 0, "hidden_dim", self.hidden_dim, f"a multiple of heads={self.heads}")
        require(self.hidden_dim % 4 == 0, "hidden_dim", self.hidden_dim, "a multiple of 4 (sine and cosine of x and y)")
        bottleneck = self.backbone in ("resnet50", "resnet101")
        require(
            bottleneck or not self.dilation, "dilation", True, f"False for {self.backbone}", "use resnet50 or resnet101"
        )
        if self.masks:
            remedy = "use 256 and 8, the paper's, or masks=False"
            require(self.hidden_dim % 128 == 0, "hidden_dim", self.hidden_dim, "a multiple of 128 with masks", remedy)
            require(self.heads % 8 == 0, "heads", self.heads, "a multiple of 8 with masks", remedy)
        if self.query_init == "grid":
            square = math.isqrt(self.num_queries) ** 2 == self.num_queries
            require(square, "num_queries", self.num_queries, "a square number with query_init='grid'")
        if self.variant != "detr":
            self._check_successor()
        if self.variant == "deformable":
            multiple = f"a multiple of {GROUPS} with variant='deformable' (group norm)"
            require(self.hidden_dim % GROUPS == 0, "hidden_dim", self.hidden_dim, multiple)
        else:
            expected = f"its defaults with variant={self.variant!r}"
            plain = self.deformable == DeformableConfig()
            require(plain, "deformable", self.deformable, expected, "set variant='deformable'")

    def _check_successor(self) -> None:
        fixed = {"masks": False, "pre_norm": False, "position_at_input": False, "decoder_input": "zeros"}
        fixed |= {"query_init": "normal", "tied_attention_init": False}
        for name, value in fixed.items():
            require(getattr(self, name) == value, name, getattr(self, name), f"{value!r} with variant={self.variant!r}")
