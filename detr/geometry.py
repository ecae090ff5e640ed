"""The geometry of the augmentation: a pure function of (seed, epoch, image id, width, height).

It is integer arithmetic on a hash, so it is the same on every machine and in every version of numpy or torch, and the
size of an augmented image is known before a byte of it is read. Sizes follow the original's rule exactly, which differs
from torchvision's by one pixel in some cases and can exceed `max_size` by one.
"""

from dataclasses import dataclass, replace

from detr.config import TransformConfig

Size = tuple[int, int]
_MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class Crop:
    """A resize to `resized` (height, width), then a cut of `size` (height, width) at (top, left), all in pixels."""

    resized: Size
    top: int
    left: int
    size: Size


@dataclass(frozen=True)
class Geometry:
    """What happens to an image, in this order: flip left to right, crop, resize to `size` (height, width)."""

    flip: bool
    crop: Crop | None
    size: Size


def resized_size(width: int, height: int, shorter: int, max_size: int | None = None) -> Size:
    """Return the (height, width) of an image whose shorter side becomes `shorter` and its longer at most `max_size`.

    This is the original's rounding, float by float: at 800 and 1333, 640 x 480 becomes 1066 x 800 and 640 x 200 becomes
    1334 x 417. No side gets shorter than a pixel.
    """
    low, high = float(min(width, height)), float(max(width, height))
    if max_size is not None and high / low * shorter > max_size:
        shorter = max(1, round(max_size * low / high))
    if min(width, height) == shorter:
        return height, width
    if width < height:
        return int(shorter * height / width), shorter
    return shorter, int(shorter * width / height)


def draw_geometry(seed: int, epoch: int, image_id: int, width: int, height: int, config: TransformConfig) -> Geometry:
    """Draw the training augmentation of one image in one epoch; `width` and `height` are its pixels before it."""
    draw = _Draw(seed, epoch, image_id)
    flip = draw.chance(config.flip)
    crop = None
    if config.crop and draw.chance(0.5):
        crop = _draw_crop(draw, width, height, config)
        height, width = crop.size
    scale = draw.choice(config.train_scales)
    return Geometry(flip, crop, resized_size(width, height, scale, config.max_size))


def eval_geometry(width: int, height: int, config: TransformConfig) -> Geometry:
    """Return the geometry of evaluation: one resize, nothing random."""
    return Geometry(False, None, resized_size(width, height, config.eval_size, config.max_size))


def crop_before_resize(geometry: Geometry, width: int, height: int) -> Geometry:
    """Return the geometry that cuts the crop out of the image of `width` x `height` first: one resize instead of two.

    The output size is the same. The crop's edges are rounded to whole pixels of the image, so it is up to half a pixel
    off on each side, and boxes and masks are cut by the crop as it then is.
    """
    if (crop := geometry.crop) is None:
        return geometry
    top, bottom = _edges(crop.top, crop.size[0], crop.resized[0], height)
    left, right = _edges(crop.left, crop.size[1], crop.resized[1], width)
    return replace(geometry, crop=Crop((height, width), top, left, (bottom - top, right - left)))


def _edges(start: int, length: int, before: int, after: int) -> tuple[int, int]:
    """Where a crop of one side of `before` pixels begins and ends on `after` pixels; never empty."""
    first = min(round(start * after / before), after - 1)
    return first, max(first + 1, round((start + length) * after / before))


def _draw_crop(draw: "_Draw", width: int, height: int, config: TransformConfig) -> Crop:
    resized = resized_size(width, height, draw.choice(config.crop_scales))
    low, high = config.crop_range
    # An image smaller than the crop's lower bound is taken whole; the original would raise.
    w = draw.integer(min(low, resized[1]), min(high, resized[1]))
    h = draw.integer(min(low, resized[0]), min(high, resized[0]))
    return Crop(resized, draw.integer(0, resized[0] - h), draw.integer(0, resized[1] - w), (h, w))


class _Draw:
    """Numbers drawn one after another from splitmix64 (Steele et al., 2014), keyed by integers."""

    def __init__(self, *key: int) -> None:
        self._state = 0
        for part in key:
            self._state = self._next() ^ (part & _MASK64)

    def _next(self) -> int:
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK64
        mixed = self._state
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _MASK64
        return mixed ^ mixed >> 31

    def chance(self, probability: float) -> bool:
        return self._next() < probability * 2**64

    def integer(self, low: int, high: int) -> int:
        """Return one of low, ..., high, both included."""
        return low + (self._next() * (high - low + 1) >> 64)

    def choice(self, options: tuple[int, ...]) -> int:
        return options[self.integer(0, len(options) - 1)]
