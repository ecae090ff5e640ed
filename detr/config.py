"""What a DETR is, how it is trained, and how its images are augmented: frozen values, checked when built.

The defaults are the paper's. Departures from it, all off by default:

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

Only int, float, str, bool and tuples of them are used, so every config survives JSON. This module imports no torch.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal


class ConfigError(ValueError):
    """A configuration that cannot work. The message is one line: what was got, what was expected, what to do."""


def _require(condition: bool, field: str, got: object, expected: str, remedy: str = "") -> None:
    if not condition:
        raise ConfigError(f"{field}: got {got!r}, expected {expected}" + (f"; {remedy}" if remedy else ""))


def _require_each(config: Any, fields: str, lowest: float, expected: str) -> None:
    for field in fields.split():
        value = getattr(config, field)
        finite = isinstance(value, int | float) and math.isfinite(value)
        _require(finite and value >= lowest, field, value, expected)


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. Sizes are in channels, layers and queries; `build_model` adds the number of classes."""

    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101", "tiny"] = "resnet50"
    norm: Literal["frozen_batch", "batch", "group"] = "frozen_batch"
    backbone_weights: str = "imagenet"
    """What the backbone starts from: `imagenet` (torchvision's own weights), `random`, or the path of a state dict.

    `build_model` loads nothing; the caller reads this and calls `load_backbone_weights`."""
    dilation: bool = False
    """Dilate the last stage instead of striding it (DC5): stride 16 instead of 32, 4x the encoder's cells."""
    frozen_stages: int = 2
    """How many backbone stages do not train: 0 none, 1 the stem, 2 the stem and layer1 (the paper), ..., 5 all."""
    position: Literal["sine", "learned"] = "sine"
    hidden_dim: int = 256
    heads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 6
    feedforward_dim: int = 2048
    dropout: float = 0.1
    num_queries: int = 100
    pre_norm: bool = False
    auxiliary: bool = True
    """Return the prediction of every decoder layer, for auxiliary losses."""
    masks: bool = False
    """Add the mask head of section 4.4: one mask per query, from the last decoder layer."""
    position_temperature: float = 10000.0
    position_at_input: bool = False
    decoder_input: Literal["zeros", "queries"] = "zeros"
    query_init: Literal["normal", "grid"] = "normal"
    tied_attention_init: bool = False

    def __post_init__(self) -> None:
        backbones = ("resnet18", "resnet34", "resnet50", "resnet101", "tiny")
        _require(self.backbone in backbones, "backbone", self.backbone, f"one of {', '.join(backbones)}")
        norms = ("frozen_batch", "batch", "group")
        _require(self.norm in norms, "norm", self.norm, f"one of {', '.join(norms)}")
        _require(bool(self.backbone_weights), "backbone_weights", "", "imagenet, random or the path of a state dict")
        _require(self.position in ("sine", "learned"), "position", self.position, "sine or learned")
        _require(self.decoder_input in ("zeros", "queries"), "decoder_input", self.decoder_input, "zeros or queries")
        _require(self.query_init in ("normal", "grid"), "query_init", self.query_init, "normal or grid")
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


@dataclass(frozen=True)
class LossConfig:
    """Matching costs and loss weights, section 3.1 and appendix A.4 of the paper.

    A cost or weight of 0 switches its term off, as the paper's ablations do (section 4.2: class and L1 alone, class and
    GIoU alone). A term that is off takes no part in the loss whatever its value, NaN included; it is still reported.
    """

    cost_class: float = 1.0
    cost_bbox: float = 5.0
    cost_giou: float = 2.0
    weight_ce: float = 1.0
    weight_bbox: float = 5.0
    weight_giou: float = 2.0
    weight_mask: float = 1.0
    weight_dice: float = 1.0
    eos_coef: float = 0.1
    """Weight of the no-object class in the cross entropy."""
    auxiliary: bool = True
    """Add the losses of the decoder layers before the last, where the model returns them."""

    def __post_init__(self) -> None:
        fields = "cost_class cost_bbox cost_giou weight_ce weight_bbox weight_giou weight_mask weight_dice eos_coef"
        _require_each(self, fields, 0, "a finite number, 0 or more")
        costs = self.cost_class + self.cost_bbox + self.cost_giou
        _require(costs > 0, "cost_class, cost_bbox, cost_giou", (0, 0, 0), "at least one above 0")


@dataclass(frozen=True)
class TransformConfig:
    """The augmentation: appendix A.4 of the paper. Sizes are pixels of the shorter side if not said otherwise.

    `TransformConfig(train_scales=(96,), flip=0.0, crop=False)` gives the same input in every epoch.
    """

    train_scales: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    eval_size: int = 800
    max_size: int = 1333
    """Bound of the longer side; the original's rounding can give one pixel more."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    crop: bool = True
    """With probability 0.5 resize to one of `crop_scales` and crop before the resize to one of `train_scales`."""
    crop_scales: tuple[int, ...] = (400, 500, 600)
    crop_range: tuple[int, int] = (384, 600)
    """Smallest and largest side of the crop, bounded by the image."""
    pixels: Literal["parity", "fast"] = "parity"
    """parity: the original's steps one by one. fast: the crop is cut before the one resize, up to half a pixel off."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for field in ("train_scales", "crop_scales"):
            scales = getattr(self, field)
            _require(len(scales) > 0 and min(scales) > 0, field, scales, "one or more positive sizes")
        _require_each(self, "eval_size max_size", 1, "at least 1")
        _require(0 <= self.flip <= 1, "flip", self.flip, "a probability, 0 to 1")
        low, high = self.crop_range
        _require(0 < low <= high, "crop_range", self.crop_range, "(smallest, largest) with 0 < smallest <= largest")
        _require(self.pixels in ("parity", "fast"), "pixels", self.pixels, "'parity' or 'fast'")
        _require(min(self.std) > 0, "std", self.std, "three numbers above 0")
