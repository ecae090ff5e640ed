"""The geometry of the augmentation: a pure function of (seed, epoch, image id, width, height).

It is integer arithmetic on a hash, so it is the same on every machine and in every version of numpy or torch, and the
size of an augmented image is known before a byte of it is read. Sizes follow the original's rule exactly, which differs
from torchvision's by one pixel in some cases and can exceed `max_size` by one.

The rule stands here twice: for one image in Python's integers (`draw_geometry`, 7 us), and for the sizes of many at once
in NumPy's (`output_sizes`, 0.15 us each), which a plan of an epoch needs. A property test holds the two together.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detr.config import TransformConfig

Size = tuple[int, int]
Ints = NDArray[np.int64]
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


def output_sizes(
    seed: int, epochs: Ints, image_ids: Ints, widths: Ints, heights: Ints, config: TransformConfig
) -> tuple[Ints, Ints]:
    """Return the heights and widths that `draw_geometry` gives many images in training, int64 [N] each.

    All arrays are integers [N]; sides are in pixels and at least 1.
    """
    widths, heights = np.array(widths, np.int64), np.array(heights, np.int64)
    draws = _Draws(np.array(seed & _MASK64, np.uint64), epochs, image_ids)
    draws.chance(config.flip)
    if config.crop:
        cropped = draws.chance(0.5)
        draws_of_crops = draws.take(cropped)
        heights[cropped], widths[cropped] = _draw_crops(draws_of_crops, widths[cropped], heights[cropped], config)
        draws.put(cropped, draws_of_crops)
    return _resized_sizes(widths, heights, draws.choice(config.train_scales), config.max_size)


def eval_geometry(width: int, height: int, config: TransformConfig) -> Geometry:
    """Return the geometry of evaluation: one resize, nothing random."""
    return Geometry(False, None, resized_size(width, height, config.eval_size, config.max_size))


def evaluated_sizes(widths: Ints, heights: Ints, config: TransformConfig) -> tuple[Ints, Ints]:
    """Return the heights and widths that `eval_geometry` gives many images, int64 [N] each; sides in pixels, at least 1."""
    widths, heights = np.array(widths, np.int64), np.array(heights, np.int64)
    return _resized_sizes(widths, heights, np.full_like(widths, config.eval_size), config.max_size)


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


def _draw_crops(draws: "_Draws", widths: Ints, heights: Ints, config: TransformConfig) -> tuple[Ints, Ints]:
    """Return the heights and widths of crops; see `_draw_crop`."""
    heights, widths = _resized_sizes(widths, heights, draws.choice(config.crop_scales))
    low, high = config.crop_range
    w = draws.integer(np.minimum(low, widths), np.minimum(high, widths))
    h = draws.integer(np.minimum(low, heights), np.minimum(high, heights))
    draws.skip(2)  # top and left
    return h, w


def _resized_sizes(widths: Ints, heights: Ints, shorter: Ints, max_size: int | None = None) -> tuple[Ints, Ints]:
    """Return the heights and widths that `resized_size` gives. Products of sides stay below 2**53, so floats are exact."""
    low, high = np.minimum(widths, heights), np.maximum(widths, heights)
    if max_size is not None:
        bounded = np.maximum(1, np.rint(max_size * low / high)).astype(np.int64)  # halves to even, as `round` does
        shorter = np.where(high / low * shorter > max_size, bounded, shorter)
    longer = (shorter * high / low).astype(np.int64)
    upright = widths < heights
    return np.where(upright, longer, shorter), np.where(upright, shorter, longer)


def upper_bits(numbers: NDArray[np.uint64], counts: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the upper 64 of the 128 bits of each product, by halves; counts below 2**32, so that nothing overflows."""
    half, lower = np.uint64(32), np.uint64(0xFFFFFFFF)
    return ((numbers >> half) * counts + ((numbers & lower) * counts >> half)) >> half


class _Draw:
    """Numbers drawn one after another from splitmix64 (Steele et al., 2014), keyed by integers."""

    _state: Any = 0

    def __init__(self, *key: int) -> None:
        for part in key:
            self._state = self._next() ^ (part & _MASK64)

    def _next(self) -> Any:
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK64
        mixed = self._state
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _MASK64
        return mixed ^ mixed >> 31

    def chance(self, probability: float) -> Any:
        # The bound as an integer: NumPy would round 64-bit draws to compare them with a float.
        return self._next() < math.ceil(probability * 2**64)

    def integer(self, low: int, high: int) -> int:
        """Return one of low, ..., high, both included."""
        return low + (self._next() * (high - low + 1) >> 64)  # type: ignore[no-any-return]

    def choice(self, options: tuple[int, ...]) -> int:
        return options[self.integer(0, len(options) - 1)]


class _Draws(_Draw):
    """The same numbers for arrays of keys: every draw is an array [N], from a state uint64 [N] that wraps around."""

    def __init__(self, *key: NDArray[Any]) -> None:
        self._state = np.zeros(1, np.uint64)
        for part in key:
            self._state = self._next() ^ part.astype(np.uint64)

    def integer(self, low: Any, high: Any) -> Any:
        return low + upper_bits(self._next(), np.asarray(high - low + 1, np.uint64)).astype(np.int64)

    def choice(self, options: tuple[int, ...]) -> Any:
        return np.array(options, np.int64)[self.integer(0, len(options) - 1)]

    def skip(self, count: int) -> None:
        for _ in range(count):
            self._next()

    def take(self, which: NDArray[np.bool_]) -> "_Draws":
        """Return the draws of some of the keys, to go on by themselves."""
        taken = _Draws()
        taken._state = self._state[which]
        return taken

    def put(self, which: NDArray[np.bool_], taken: "_Draws") -> None:
        """Go on, for these keys, after what was drawn by themselves."""
        self._state[which] = taken._state
