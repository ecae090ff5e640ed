"""Configuration of the model, its losses and its augmentation: frozen dataclasses that check themselves when built.

The docstrings of the fields are the help texts of the flags. The defaults are the paper's. Departures from it, all off by default:

- `norm="batch" | "group"`: trainable normalisation in the backbone instead of frozen batch norm. Frozen statistics need
  pre-trained weights, so a backbone that starts from random ones needs this.
- `backbone="tiny"`: four small stages (stride 16, 16 to 128 channels) for small images on a CPU.
- `position_temperature` other than 10000: small images have few cells, which 10000 barely tells apart.
- `position_at_input`: the positions are also added once to the encoder's input.
- `decoder_input="queries"`: the decoder starts from the query embeddings instead of zeros.
- `pixels="fast"` (augmentation): crops are cut out before the resize instead of between two, so that images are
  resized once; sizes are the same, pixels are sharper by one interpolation.
- `query_init="grid"`: query embeddings start as the positions of a square grid instead of random normal.
- `tied_attention_init`: query and key projections start equal in the encoder's self-attention and the decoder's
  cross-attention, so that attention starts local.

Fields hold only int, float, str, bool and tuples of them, so every config survives JSON. This module imports no torch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

GROUPS = 32
"""Number of groups of the group norm after each projection of a feature level in Deformable DETR."""


class ConfigError(ValueError):
    """Raised for a configuration that cannot work. The message is one line: got, expected, what to do."""


@cache
def literal_fields(kind: type) -> dict[str, tuple[str, ...]]:
    """Return the allowed values of each field of the dataclass `kind` that is annotated as a `Literal`."""
    hints = get_type_hints(kind).items()
    return {name: get_args(hint) for name, hint in hints if get_origin(hint) is Literal}


def check_literals(config: Any, require: Callable[[bool, str, object, str], None], prefix: str = "") -> None:
    """Call `require(holds, field, got, expected)` for each `Literal` field of the dataclass instance `config`.

    `require` raises the caller's error if `holds` is false. `prefix` is put in front of the field's name.
    """
    for name, choices in literal_fields(config.__class__).items():
        got = getattr(config, name)
        require(got in choices, prefix + name, got, f"one of {', '.join(choices)}")


def _require(condition: bool, field: str, got: object, expected: str, remedy: str = "") -> None:
    if not condition:
        raise ConfigError(f"{field}: got {got!r}, expected {expected}" + (f"; {remedy}" if remedy else ""))


def _require_each(config: Any, fields: str, lowest: float, expected: str) -> None:
    for name in fields.split():
        value = getattr(config, name)
        finite = isinstance(value, int | float) and math.isfinite(value)
        _require(finite and value >= lowest, name, value, expected)


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
        _require(self.levels == 1 or self.levels >= 3, "deformable.levels", self.levels, "1, or 3 or more")
        _require_each(self, "encoder_points decoder_points", 1, "at least 1")
        _require_each(self, "one_to_many_queries", 0, "0 or more")
        refine, stages = "True with {}", "add box_refine"
        _require(
            self.box_refine or not self.two_stage, "deformable.box_refine", False, refine.format("two_stage"), stages
        )
        needs = refine.format("look_forward_twice")
        _require(self.box_refine or not self.look_forward_twice, "deformable.box_refine", False, needs, stages)
        needs = "True with mixed_selection"
        _require(self.two_stage or not self.mixed_selection, "deformable.two_stage", False, needs, "add two_stage")


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
        check_literals(self, _require)
        _require(bool(self.backbone_weights), "backbone_weights", "", "imagenet, random or the path of a state dict")
        _require_each(self, "hidden_dim heads decoder_layers feedforward_dim num_queries", 1, "at least 1")
        _require_each(self, "encoder_layers", 0, "0 or more")
        _require(0 <= self.frozen_stages <= 5, "frozen_stages", self.frozen_stages, "0 (none) to 5 (all)")
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "at least 0 and below 1")
        _require(self.position_temperature > 1, "position_temperature", self.position_temperature, "above 1")
        _require(self.hidden_dim % self.heads == 0, "hidden_dim", self.hidden_dim, f"a multiple of heads={self.heads}")
        _require(
            self.hidden_dim % 4 == 0, "hidden_dim", self.hidden_dim, "a multiple of 4 (sine and cosine of x and y)"
        )
        bottleneck = self.backbone in ("resnet50", "resnet101")
        _require(
            bottleneck or not self.dilation, "dilation", True, f"False for {self.backbone}", "use resnet50 or resnet101"
        )
        if self.masks:
            remedy = "use 256 and 8, the paper's, or masks=False"
            _require(self.hidden_dim % 128 == 0, "hidden_dim", self.hidden_dim, "a multiple of 128 with masks", remedy)
            _require(self.heads % 8 == 0, "heads", self.heads, "a multiple of 8 with masks", remedy)
        if self.query_init == "grid":
            square = math.isqrt(self.num_queries) ** 2 == self.num_queries
            _require(square, "num_queries", self.num_queries, "a square number with query_init='grid'")
        if self.variant != "detr":
            self._check_successor()
        if self.variant == "deformable":
            multiple = f"a multiple of {GROUPS} with variant='deformable' (group norm)"
            _require(self.hidden_dim % GROUPS == 0, "hidden_dim", self.hidden_dim, multiple)
        else:
            expected = f"its defaults with variant={self.variant!r}"
            plain = self.deformable == DeformableConfig()
            _require(plain, "deformable", self.deformable, expected, "set variant='deformable'")

    def _check_successor(self) -> None:
        fixed = {"masks": False, "pre_norm": False, "position_at_input": False, "decoder_input": "zeros"}
        fixed |= {"query_init": "normal", "tied_attention_init": False}
        for name, value in fixed.items():
            _require(
                getattr(self, name) == value, name, getattr(self, name), f"{value!r} with variant={self.variant!r}"
            )


@dataclass(frozen=True)
class LossConfig:
    """Matching costs and loss weights (section 3.1 and appendix A.4 of the paper).

    A cost or weight of 0 switches its term off, as in the paper's ablations (section 4.2). A term that is off never
    changes the loss, whatever its value, NaN included; it is still reported.
    """

    cost_class: float = 1.0
    """Matching cost of the class probability. 0: off."""
    cost_bbox: float = 5.0
    """Matching cost of the L1 distance between boxes. 0: off."""
    cost_giou: float = 2.0
    """Matching cost of the generalised IoU of boxes. 0: off."""
    weight_ce: float = 1.0
    """Weight of the classification loss (cross entropy). 0: off."""
    weight_bbox: float = 5.0
    """Weight of the L1 loss of boxes. 0: off."""
    weight_giou: float = 2.0
    """Weight of the generalised IoU loss of boxes. 0: off."""
    weight_mask: float = 1.0
    """Weight of the focal loss of masks, for models with masks. 0: off."""
    weight_dice: float = 1.0
    """Weight of the DICE loss of masks, for models with masks. 0: off."""
    focal_alpha: float = 0.25
    """Weight of likely classes in the focal loss and its matching cost, 0 to 1; others have 1 - `focal_alpha`.
    Only for models with a sigmoid per class, which are all variants but the paper's."""
    one_to_many_copies: int = 6
    """Number of queries that may match each object in hybrid matching (`model.deformable.one_to_many_queries`)."""
    weight_one_to_many: float = 1.0
    """Weight of the losses of hybrid matching, in addition to their own. 0: off."""
    eos_coef: float = 0.1
    """Weight of the class "no object" in the cross entropy; real classes have weight 1.
    Raise it if most queries have an object to match."""
    auxiliary: bool = True
    """Compute the losses of every decoder layer, as in the paper, not only of the last. Needs `model.auxiliary`."""

    def __post_init__(self) -> None:
        fields = "cost_class cost_bbox cost_giou weight_ce weight_bbox weight_giou weight_mask weight_dice eos_coef"
        _require_each(self, f"{fields} weight_one_to_many", 0, "a finite number, 0 or more")
        _require(0 <= self.focal_alpha <= 1, "focal_alpha", self.focal_alpha, "0 to 1")
        _require_each(self, "one_to_many_copies", 0, "0 or more")
        costs = self.cost_class + self.cost_bbox + self.cost_giou
        _require(costs > 0, "cost_class, cost_bbox, cost_giou", (0, 0, 0), "at least one above 0")


@dataclass(frozen=True)
class TransformConfig:
    """Image sizes and augmentation (appendix A.4 of the paper). Sizes are pixels of the shorter side.

    `TransformConfig(train_scales=(96,), flip=0.0, crop=False)` gives the same input in every epoch.
    """

    train_scales: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    """Sizes for training images, in pixels of the shorter side; one is drawn at random for each image."""
    eval_size: int = 800
    """Size for evaluation and prediction, in pixels of the shorter side."""
    max_size: int = 1333
    """Maximum of the longer side in pixels, in training and evaluation.
    Larger images are scaled down; rounding, as in the original, can give one pixel more."""
    flip: float = 0.5
    """Probability of a horizontal flip in training, 0 to 1."""
    crop: bool = True
    """Crop half of the training images: resize to one of `crop_scales`, crop, then resize to one of `train_scales`."""
    crop_scales: tuple[int, ...] = (400, 500, 600)
    """Sizes before a random crop, in pixels of the shorter side; one is drawn at random for each image."""
    crop_range: tuple[int, int] = (384, 600)
    """Minimum and maximum side of a random crop in pixels; never larger than the image."""
    pixels: Literal["parity", "fast"] = "parity"
    """Resampling of cropped images.
    parity: resize, crop, resize, exactly as in the original.
    fast: crop first and resize once, up to half a pixel off."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of the red, green and blue channels that images are normalised with, for values from 0 to 1.
    ImageNet's; match it to the backbone's weights."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of the red, green and blue channels that images are normalised with, above 0.
    ImageNet's; match it to the backbone's weights."""

    def __post_init__(self) -> None:
        check_literals(self, _require)
        for name in ("train_scales", "crop_scales"):
            scales = getattr(self, name)
            _require(len(scales) > 0 and min(scales) > 0, name, scales, "one or more positive sizes")
        _require_each(self, "eval_size max_size", 1, "at least 1")
        _require(0 <= self.flip <= 1, "flip", self.flip, "a probability, 0 to 1")
        low, high = self.crop_range
        _require(0 < low <= high, "crop_range", self.crop_range, "(smallest, largest) with 0 < smallest <= largest")
        _require(min(self.std) > 0, "std", self.std, "three numbers above 0")
