"""Pictures for people: detections next to the truth, and lines in a chart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageColor, ImageDraw, ImageFont

# Distinct under the common colour-vision deficiencies (Okabe and Ito), assigned to labels in turn.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
_MIN_SIDE = 320  # a demo image of 96 px is enlarged before text is written on it


@dataclass(frozen=True)
class Boxes:
    """What is drawn on one picture: boxes in pixels of the image, xyxy [N, 4]; names; scores or None for the truth.

    masks: bool [N, height, width] of the image, or None.
    """

    xyxy: npt.NDArray[np.float64]
    labels: Sequence[int]
    names: Sequence[str]
    scores: Sequence[float] | None = None
    masks: npt.NDArray[np.bool_] | None = None


def draw(image: Image.Image, boxes: Boxes) -> Image.Image:
    """A copy of the image with the boxes, their names and masks; small images are enlarged by a whole factor."""
    factor = max(1, -(-_MIN_SIDE // max(image.size)))
    picture = _tinted(image.convert("RGB"), boxes)
    picture = picture.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    canvas = ImageDraw.Draw(picture)
    size = max(12, round(max(picture.size) / 45))
    font = ImageFont.load_default(size)
    # The surest last, so that its box and name stay on top.
    order = range(len(boxes.labels)) if boxes.scores is None else np.argsort(boxes.scores, kind="stable").tolist()
    for number in order:
        colour = COLOURS[boxes.labels[number] % len(COLOURS)]
        x0, y0, x1, y1 = (float(value) * factor for value in boxes.xyxy[number])
        x0, x1 = sorted((min(max(x0, 0), picture.width - 1), min(max(x1, 0), picture.width - 1)))
        y0, y1 = sorted((min(max(y0, 0), picture.height - 1), min(max(y1, 0), picture.height - 1)))
        canvas.rectangle((x0, y0, x1, y1), outline=colour, width=max(2, size // 6))
        text = boxes.names[number] if boxes.scores is None else f"{boxes.names[number]} {boxes.scores[number]:.2f}"
        left, _, right, bottom = canvas.textbbox((0, 0), text, font=font)
        corner = (min(x0, picture.width - right - 4), max(0.0, y0 - bottom - 2))
        canvas.rectangle((corner[0], corner[1], corner[0] + right - left + 4, corner[1] + bottom + 2), fill=colour)
        canvas.text((corner[0] + 2, corner[1]), text, fill="black", font=font)
    return picture


def _tinted(image: Image.Image, boxes: Boxes) -> Image.Image:
    """The image with every mask half in its object's colour; of masks that overlap, both are seen."""
    if boxes.masks is None:
        return image
    pixels = np.array(image)
    for label, mask in zip(boxes.labels, boxes.masks, strict=True):
        colour = np.array(ImageColor.getrgb(COLOURS[label % len(COLOURS)]))
        pixels[mask] = (pixels[mask] + colour) // 2
    return Image.fromarray(pixels)


@dataclass(frozen=True)
class Line:
    """A line of a chart: its name, its colour, and its values in 0..1, or below 0 where there are none."""

    name: str
    colour: str
    ys: Sequence[float]


def chart(lines: Sequence[Line], xs: Sequence[float], x_name: str, y_name: str) -> Image.Image:
    """640 by 480 pixels: lines over `xs`, both axes from 0 to 1, the lines' names above. The last line lies on top."""
    scale = 2  # drawn larger and then reduced, which smooths the lines
    picture = Image.new("RGB", (640 * scale, 480 * scale), "white")
    canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(14 * scale)
    left, top, right, bottom = (one * scale for one in (48, 60, 620, 432))

    def at(x: float, y: float) -> tuple[float, float]:
        return left + x * (right - left), bottom - y * (bottom - top)

    for tick in (0, 0.2, 0.4, 0.6, 0.8, 1):
        canvas.line((*at(tick, 0), *at(tick, 1)), "#DDDDDD", scale)
        canvas.line((*at(0, tick), *at(1, tick)), "#DDDDDD", scale)
        canvas.text((at(tick, 0)[0], bottom + 6 * scale), f"{tick:.1f}", "black", font, anchor="mt")
        canvas.text((left - 6 * scale, at(0, tick)[1]), f"{tick:.1f}", "black", font, anchor="rm")
    canvas.line((*at(0, 1), *at(0, 0), *at(1, 0)), "black", scale)
    canvas.text(((left + right) / 2, bottom + 26 * scale), x_name, "black", font, anchor="mt")
    canvas.text((8 * scale, 36 * scale), y_name, "black", font)
    start = float(left)
    for line in lines:
        points = [at(x, y) for x, y in zip(xs, line.ys, strict=True) if y >= 0]
        canvas.line(points, line.colour, 2 * scale, joint="curve")
        canvas.line((start, 18 * scale, start + 24 * scale, 18 * scale), line.colour, 3 * scale)
        canvas.text((start + 30 * scale, 18 * scale), line.name, "black", font, anchor="lm")
        start += 54 * scale + canvas.textlength(line.name, font)
    return picture.resize((640, 480), Image.Resampling.LANCZOS)


def side_by_side(left: Image.Image, right: Image.Image, captions: tuple[str, str]) -> Image.Image:
    """Two pictures of equal size with a caption over each."""
    bar = 22
    joined = Image.new("RGB", (left.width + right.width + 6, left.height + bar), "white")
    joined.paste(left, (0, bar))
    joined.paste(right, (left.width + 6, bar))
    canvas = ImageDraw.Draw(joined)
    font = ImageFont.load_default(14)
    canvas.text((4, 3), captions[0], fill="black", font=font)
    canvas.text((left.width + 10, 3), captions[1], fill="black", font=font)
    return joined


def contact_sheet(pictures: Sequence[Image.Image], columns: int = 2, width: int = 1280) -> Image.Image:
    """Pictures in a grid, each scaled to fit its column."""
    cell = width // columns
    scaled = [picture.resize((cell, round(picture.height * cell / picture.width))) for picture in pictures]
    rows = [scaled[start : start + columns] for start in range(0, len(scaled), columns)]
    heights = [max(picture.height for picture in row) for row in rows]
    sheet = Image.new("RGB", (width, sum(heights) or 1), "white")
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for column, picture in enumerate(row):
            sheet.paste(picture, (column * cell, top))
        top += height
    return sheet
