"""Configuration of image sizes and augmentation."""

from dataclasses import dataclass
from typing import Literal

from detr.config.checks import check_literals, require, require_each


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
        check_literals(self, require)
        for name in ("train_scales", "crop_scales"):
            scales = getattr(self, name)
            require(len(scales) > 0 and min(scales) > 0, name, scales, "one or more positive sizes")
        require_each(self, "eval_size max_size", 1, "at least 1")
        require(0 <= self.flip <= 1, "flip", self.flip, "a probability, 0 to 1")
        low, high = self.crop_range
        require(0 < low <= high, "crop_range", self.crop_range, "(smallest, largest) with 0 < smallest <= largest")
        require(min(self.std) > 0, "std", self.std, "three numbers above 0")
