"""Conversion of a decoded picture to RGB, as training and serving need it."""

import numpy as np
from PIL import Image


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a copy of an image as RGB of 8 bits, without transparency; a 16-bit grey PNG gives its upper 8 bits.

    Raise `ValueError` for other grey images of more than 8 bits: Pillow would clip them at 255, to black and white, and
    the file does not say which value is the brightest.
    """
    if image.mode == "I;16" and image.format == "PNG":
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F" or image.mode.startswith("I"):
        raise ValueError(
            f"its pixels are grey of more than 8 bits ({image.format} of Pillow's mode {image.mode}); expected 8 bits per "
            "channel, or a PNG of 16-bit grey: convert it"
        )
    return image.convert("RGB")
