"""Pictures of the decoder's attention, as in the paper's figure 6: the cells of the image that each detection has read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from detr.config import TransformConfig
from detr.variant import DETR
from pipeline.display.draw import COLOURS, Boxes, contact_sheet, draw, titled
from pipeline.display.report import html_picture
from pipeline.evaluation.attention import Attended, attended_detections
from shards.arrays import Floats
from shards.config import ReadConfig
from shards.dataset.manifest import Manifest
from shards.read.loader import read_samples
from shards.score.diagnosis import THRESHOLD, Diagnosis
from shards.score.worst_images import JudgedImage

_IMAGES, _MOST = 4, 3  # worst images, and detections of each
_EXPLANATIONS = (
    "The cells of the image that the query of each detection has read in the last decoder layer: the mean of the weights of "
    "all heads. The first tile of a figure has the detections, each in the colour of its own tile.",
    "The points that the query of each detection has read in the last decoder layer, of all heads and levels; larger ones have "
    "more weight. The first tile of a figure has the detections, each in the colour of its own tile.",
)
_DIMMED, _BEHIND_POINTS = 0.3, 0.65  # brightness of cells that are not attended to, and of the image behind points
_CONTRAST = 0.7  # exponent of weights relative to the largest; below 1, small ones stay visible
_LEAST_RADIUS, _RADII = 1.0, 4.0  # of points, in pixels of a tile of 320


def attention_picture(
    image: Image.Image,
    attended: Sequence[Attended],
    names: Sequence[str],
    title: str = "",
    columns: int = 2,
    tile: int = 320,
) -> Image.Image:
    """Return the image with its detections, then a dimmed copy per detection that shows what its query has read.

    `names` are those of the model's labels. All tiles are `tile` pixels wide.
    """
    factor = tile / image.width
    small = image.resize((tile, max(1, round(image.height * factor))), Image.Resampling.BILINEAR)
    shown = [draw(small, _boxes(attended, names, factor))]
    for number, detection in enumerate(attended):
        colour = COLOURS[number % len(COLOURS)]
        weights = _over(detection, small) ** _CONTRAST
        lit = _lit(small, weights, colour, _DIMMED if detection.points is None else _BEHIND_POINTS)
        if detection.points is not None:
            lit = _with_points(lit, detection.points, colour)
        shown.append(draw(lit, _boxes([detection], names, factor, number)))
    sheet = contact_sheet(shown, columns, columns * tile)
    return titled(sheet, title) if title else sheet


def _boxes(attended: Sequence[Attended], names: Sequence[str], factor: float, first: int = 0) -> Boxes:
    """Return the boxes; each detection has a colour of its own, the same as that of its attention."""
    corners = np.array([detection.box_xyxy for detection in attended], np.float64).reshape(-1, 4) * factor
    return Boxes(
        corners,
        list(range(first, first + len(attended))),
        [names[detection.label] for detection in attended],
        [detection.score for detection in attended],
    )


def _over(detection: Attended, image: Image.Image) -> Floats:
    """Return the weights of cells at each pixel, relative to the largest, [height, width]; 0 for points."""
    if detection.cells is None:
        return np.zeros((image.height, image.width))
    relative = np.asarray(detection.cells / max(float(detection.cells.max()), 1e-12), np.float32)
    enlarged = Image.fromarray(relative).resize(image.size, Image.Resampling.BILINEAR)
    return np.asarray(enlarged, np.float64).clip(0, 1)


def _lit(image: Image.Image, weights: Floats, colour: str, dimmed: float) -> Image.Image:
    """Return the image dimmed and grey, in its own colours and a tint where the weights are high."""
    pixels = np.asarray(image.convert("RGB"), np.float64)
    grey = np.asarray(image.convert("L"), np.float64)[..., None] * dimmed
    tint = np.array(ImageColor.getrgb(colour), np.float64)
    lit = 0.55 * pixels + 0.45 * tint
    share = weights[..., None]
    return Image.fromarray((grey * (1 - share) + lit * share).round().astype(np.uint8))


def _with_points(image: Image.Image, points: Floats, colour: str) -> Image.Image:
    """Return the image with a disc at each point, larger with its weight, the heaviest on top."""
    canvas = image.copy()
    pen = ImageDraw.Draw(canvas)
    largest = max(float(points[:, 2].max(initial=0)), 1e-12)
    for x, y, weight in points[np.argsort(points[:, 2], kind="stable")].tolist():
        radius = _LEAST_RADIUS + _RADII * weight / largest
        centre = x * image.width, y * image.height
        corners = (centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius)
        pen.ellipse(corners, fill=colour, outline="white" if weight > largest / 2 else None)
    return canvas


def judged_pictures(
    model: DETR, transform: TransformConfig, names: Sequence[str], manifest: Manifest, images: Sequence[JudgedImage]
) -> Iterator[Image.Image]:
    """Yield a picture per image of a data set: up to three detections, and what the query of each has read."""
    rows = manifest.index().rows_of([image.image_id for image in images])
    for sample, judged in zip(read_samples(manifest, rows, ReadConfig(threads=0)), images, strict=True):
        attended = attended_detections(model, sample.image, transform, THRESHOLD, _MOST)
        title = f"image {judged.image_id}: {judged.found} of {judged.objects} found, {judged.false} false"
        yield attention_picture(Image.fromarray(sample.image), attended, names, title)


@dataclass(frozen=True)
class AttentionFigure:
    """Picture of the attention of detections in an image, and its caption."""

    picture: Image.Image
    caption: str


def attention_figures(
    model: DETR, transform: TransformConfig, names: Sequence[str], manifest: Manifest, diagnosis: Diagnosis
) -> list[AttentionFigure]:
    """Return the attention of detections in the best and the worst images of an evaluation."""
    figures = []
    for title, images in (("best", diagnosis.best), ("worst", diagnosis.worst[:_IMAGES])):
        pictures = judged_pictures(model, transform, names, manifest, images) if images else ()
        figures += [
            AttentionFigure(picture, f"among the {title} images, {judged.shard}")
            for picture, judged in zip(pictures, images, strict=True)
        ]
    return figures


def attention_section(model: DETR, figures: Sequence[AttentionFigure]) -> str:
    """Return a section of a report; empty without figures."""
    if not figures:
        return ""
    explanation = _EXPLANATIONS[model.config.variant == "deformable"]
    shown = "".join(html_picture(figure.picture, "WEBP", figure.caption) for figure in figures)
    return f"<h2>Attention</h2><p>{explanation}</p><div class=grid>{shown}</div>"
