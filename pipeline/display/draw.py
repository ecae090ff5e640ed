"""Pictures with boxes and masks, charts, and layouts of several pictures."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Distinct under the common colour-vision deficiencies (Okabe and Ito), assigned to labels in turn.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
_MIN_SIDE = 320  # smaller images are enlarged, so that text fits
_FEW = 25  # points of a line that get marks, so that a single point is seen


@dataclass(frozen=True)
class Boxes:
    """Objects to draw on one picture: boxes as xyxy [N, 4] in pixels of the image, labels, names and perhaps scores.

    `masks` is bool [N, height, width], of the image's size, or None. Ground truth has no scores. A box with an empty name
    gets no text.
    """

    xyxy: npt.NDArray[np.float64]
    labels: Sequence[int]
    names: Sequence[str]
    scores: Sequence[float] | None = None
    masks: npt.NDArray[np.bool_] | None = None


def draw(image: Image.Image, boxes: Boxes) -> Image.Image:
    """Return a copy of the image with masks, boxes, names and scores; a small image is enlarged."""
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    if boxes.masks is not None:
        # One at a time: torchvision draws the overlap of several masks in black.
        for label, mask in zip(boxes.labels, boxes.masks, strict=True):
            pixels = draw_segmentation_masks(pixels, torch.from_numpy(mask), alpha=0.5, colors=_colour(label))
    factor = max(1, math.ceil(_MIN_SIDE / max(image.size)))
    if factor > 1:
        pixels = pixels.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    if not boxes.labels:
        return _picture(pixels)
    height, width = pixels.shape[1:]
    font_size = max(12, round(max(height, width) / 45))
    # The highest score is drawn last, on top of the others.
    scores = np.zeros(len(boxes.labels)) if boxes.scores is None else np.asarray(boxes.scores)
    order = np.argsort(scores, kind="stable").tolist()
    corners = torch.from_numpy(boxes.xyxy[order]).view(-1, 2, 2) * factor
    corners = corners.clamp(min=torch.zeros(2), max=torch.tensor([width - 1, height - 1])).sort(dim=1).values
    colours = [_colour(boxes.labels[number]) for number in order]
    pixels = draw_bounding_boxes(pixels, corners.view(-1, 4), colors=colours, width=max(2, font_size // 6))
    picture = _picture(pixels)
    for number, (corner, _), colour in zip(order, corners.tolist(), colours, strict=True):
        name = boxes.names[number]
        if name:
            text = name if boxes.scores is None else f"{name} {scores[number]:.2f}"
            _write_label(picture, corner, text, colour, font_size)
    return picture


def _colour(label: int) -> str:
    return COLOURS[label % len(COLOURS)]


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return the font of all texts in pictures."""
    return ImageFont.load_default(size)  # Pillow decodes its file at each call


def _picture(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _write_label(picture: Image.Image, corner: Sequence[float], text: str, colour: str, font_size: int) -> None:
    """Write a text above the left upper corner of a box, or as close to it as the picture allows.

    torchvision writes labels inside the boxes, where they hide small objects and are cut off at the picture's edge.
    """
    canvas, face = ImageDraw.Draw(picture), font(font_size)
    left, _, right, bottom = canvas.textbbox((0, 0), text, font=face)
    x, y = min(corner[0], picture.width - right - 4), max(0.0, corner[1] - bottom - 2)
    canvas.rectangle((x, y, x + right - left + 4, y + bottom + 2), fill=colour)
    canvas.text((x + 2, y), text, fill="black", font=face)


@dataclass(frozen=True)
class Line:
    """Line of a chart; `ys` are negative where there is no value, and a mark is drawn at each if there are few."""

    name: str
    colour: str
    ys: Sequence[float]


def chart(
    lines: Sequence[Line], xs: Sequence[float], x_name: str, y_name: str, *, x_end: float = 1.0, y_end: float = 1.0
) -> Image.Image:
    """Return a chart of 640 by 480 pixels with both axes from 0 and a legend; the last line is on top."""
    # Imported here, because it takes longer than most commands; without pyplot, which keeps figures in global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), dpi=100)
    axes = figure.add_axes((0.1, 0.125, 0.875, 0.775), xlim=(0, x_end), ylim=(0, y_end), xlabel=x_name, ylabel=y_name)
    axes.grid(color="#DDDDDD")
    axes.spines[["top", "right"]].set_visible(False)
    for line in lines:
        ys = np.asarray(line.ys, dtype=float)
        marker = "o" if len(ys) < _FEW else None
        axes.plot(
            xs,
            np.where(ys >= 0, ys, np.nan),
            color=line.colour,
            label=line.name,
            clip_on=False,
            marker=marker,
            markersize=4,
        )
    figure.legend(loc="upper center", ncols=max(len(lines), 1), frameon=False)
    return figure_picture(figure)


def figure_picture(figure: Figure) -> Image.Image:
    """Return a figure of matplotlib as a picture; dollar signs in its texts are dollar signs, and begin no formula."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    return Image.fromarray(pixels).convert("RGB")


def side_by_side(left: Image.Image, right: Image.Image, captions: tuple[str, str]) -> Image.Image:
    """Return two pictures of equal size next to each other, with a caption above each."""
    bar = 22
    joined = Image.new("RGB", (left.width + right.width + 6, left.height + bar), "white")
    joined.paste(left, (0, bar))
    joined.paste(right, (left.width + 6, bar))
    canvas = ImageDraw.Draw(joined)
    face = font(14)
    canvas.text((4, 3), captions[0], fill="black", font=face)
    canvas.text((left.width + 10, 3), captions[1], fill="black", font=face)
    return joined


def titled(picture: Image.Image, title: str) -> Image.Image:
    """Return a picture below a line of text."""
    bar = 26
    joined = Image.new("RGB", (picture.width, picture.height + bar), "white")
    joined.paste(picture, (0, bar))
    ImageDraw.Draw(joined).text((4, 4), title, fill="black", font=font(16))
    return joined


def contact_sheet(pictures: Sequence[Image.Image], columns: int = 2, width: int = 1280) -> Image.Image:
    """Return pictures in a grid, each scaled to the width of its column."""
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
