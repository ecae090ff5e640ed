"""Checks of the images and annotations of a COCO JSON, on whole columns at once, with a defect for each problem."""

from collections.abc import Callable, Iterable
from pathlib import PurePosixPath

import msgspec
import numpy as np

from shards.arrays import Floats, Ints, Mask
from shards.masks.parse import FormError, parse_segmentation
from shards.source.columns import AnnotationColumns, ImageColumns, duplicated, positions, repeated
from shards.source.defects import Defect

MAX_IMAGE_ID = 10**12 - 1  # keys of samples have twelve digits

# Pixels that a box may reach beyond its image without a note; COCO's boxes are rounded to hundredths.
_SLACK = 0.5
_NO_NAMES = frozenset({"", ".", ".."})


def check_images(columns: ImageColumns, has_file: Callable[[str], bool]) -> tuple[Ints, list[Defect]]:
    """Return the rows of the valid images, and the defects of the others; contents are not checked here.

    An image that is listed twice with the same file and size counts once. If entries of one id disagree, all are
    rejected, because it is unknown to which of them the annotations belong.
    """
    defects: list[Defect] = []
    keep = np.ones(len(columns), np.bool_)

    def reject(row: int, kind: str, problem: str) -> None:
        keep[row] = False
        image_id, name = int(columns.ids[row]), columns.names[row]
        defects.append(Defect(f"image {image_id} ({name}): {problem}", kind, image_id))

    for row in _rows((columns.ids < 0) | (columns.ids > MAX_IMAGE_ID)):
        reject(row, "malformed", f"its id is not in 0..{MAX_IMAGE_ID}")
    for row in _rows((columns.widths < 1) | (columns.heights < 1)):
        reject(row, "malformed", f"its size is {columns.widths[row]}x{columns.heights[row]}")
    for row, agreed in _duplicates(columns):
        reject(row, "duplicate-image-id", "its id is given twice" + ("" if agreed else ", to images that differ"))
    # Nearly all names are plain names of existing files and need no further check.
    suspects = [row for row, name in enumerate(columns.names) if "/" in name or name in _NO_NAMES or not has_file(name)]
    for row in suspects:
        name = columns.names[row]
        if leaves_folder(name):
            reject(row, "malformed", "its file name leaves the folder of images")
        elif not has_file(name):
            reject(row, "missing-file", "no such file in the folder of images")
    return np.flatnonzero(keep), defects


def check_annotations(
    columns: AnnotationColumns, selected: Mask, images: ImageColumns, listed: Ints, categories: Ints
) -> tuple[Ints, Ints, list[Defect]]:
    """Check the `selected` annotations; return the rows of the valid ones, the rows of their images, and all defects.

    `images` are the valid images, `listed` the ids of all images. Annotations of a listed but invalid image are left
    out without a defect, because their image already has one.
    """
    defects: list[Defect] = []
    valid = selected.copy()

    def note(kind: str, rows: Mask, problem: Callable[[int], str]) -> None:
        for row in _rows(rows & valid):
            number, image_id = int(columns.ids[row]), int(columns.image_ids[row])
            defects.append(Defect(f"annotation {number} of image {image_id}: {problem(row)}", kind, image_id, number))

    def reject(kind: str, rows: Mask, problem: Callable[[int], str]) -> None:
        note(kind, rows, problem)
        valid[rows] = False

    boxes, areas = columns.boxes, columns.areas
    sizes = boxes[:, 2:]

    def box_text(row: int) -> str:
        return f"[{', '.join(f'{number:.6g}' for number in boxes[row])}]"

    def box_and_area(row: int) -> str:
        return f"box {box_text(row)} or area {areas[row]:.6g}"

    reject("duplicate-annotation-id", repeated(columns.ids), lambda row: "its id is given twice")
    reject("unknown-image", ~np.isin(columns.image_ids, listed), lambda row: "no such image is listed")
    owners = positions(columns.image_ids, images.ids)
    valid &= owners >= 0
    unknown = ~np.isin(columns.category_ids, categories)
    reject("unknown-category", unknown, lambda row: f"its category {columns.category_ids[row]} is not listed")
    finite = np.isfinite(boxes).all(axis=1) & np.isfinite(areas)
    reject("box-not-finite", ~finite, lambda row: f"its {box_and_area(row)} is not finite")
    negative = (sizes < 0).any(axis=1) | (areas < 0)
    reject("box-negative", negative, lambda row: f"its {box_and_area(row)} is negative")
    bad_crowd = (columns.iscrowd != 0) & (columns.iscrowd != 1)
    reject("malformed", bad_crowd, lambda row: f"its iscrowd is {columns.iscrowd[row]}, not 0 or 1")
    empty = (sizes == 0).any(axis=1)
    note("zero-area-box", empty, lambda row: f"its box {box_text(row)} has no area")
    excess, outside = _beyond(boxes, images, owners)
    note(
        "box-outside",
        (excess > _SLACK) & ~outside,
        lambda row: f"its box {box_text(row)} reaches {excess[row]:.6g} pixels beyond the image",
    )
    note("box-off-image", outside, lambda row: f"its box {box_text(row)} lies wholly outside the image")
    rows = np.flatnonzero(valid)
    return rows, owners[rows], defects


def _duplicates(columns: ImageColumns) -> list[tuple[int, bool]]:
    """Return the rows to leave out because of their id, each with true if all entries of that id agree."""
    by_id: dict[int, list[int]] = {}
    for row in _rows(duplicated(columns.ids)):
        by_id.setdefault(int(columns.ids[row]), []).append(row)
    duplicates = []
    for rows in by_id.values():
        agreed = len({(columns.names[row], columns.widths[row], columns.heights[row]) for row in rows}) == 1
        duplicates += [(row, agreed) for row in (rows[1:] if agreed else rows)]
    return duplicates


def leaves_folder(name: str) -> bool:
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or not path.parts


def _rows(mask: Mask) -> list[int]:
    return [int(row) for row in np.flatnonzero(mask)]


def _beyond(boxes: Floats, images: ImageColumns, owners: Ints) -> tuple[Floats, Mask]:
    """Return how far boxes reach beyond their images, float64 [N] in pixels, and which lie wholly outside, bool [N].

    `owners` are the rows of the boxes' images, -1 without a valid image: the distance is then NaN. It is negative for a
    box inside the image. A box that only touches the image's edge from outside counts as outside.
    """
    # An owner of -1 picks the appended 0.
    image_widths = np.append(images.widths, 0)[owners]
    image_heights = np.append(images.heights, 0)[owners]
    x, y, width, height = boxes.T
    with np.errstate(invalid="ignore", over="ignore"):  # the end of a finite box may be infinite
        excess = np.maximum.reduce([-x, -y, x + width - image_widths, y + height - image_heights])
        outside = (x >= image_widths) | (y >= image_heights) | (x + width <= 0) | (y + height <= 0)
    return np.where(owners < 0, np.nan, excess), outside & (excess > _SLACK) & (owners >= 0)


class _Annotation(msgspec.Struct, gc=False):
    id: int
    segmentation: msgspec.Raw = msgspec.Raw(b"null")


_annotation = msgspec.json.Decoder(_Annotation)


def outline_defects(image_id: int, annotations: Iterable[bytes], height: int, width: int) -> list[Defect]:
    """Return a defect for each of an image's annotations, given as JSON, whose segmentation cannot be used."""
    defects = []
    for text in annotations:
        annotation = _annotation.decode(text)
        try:
            parse_segmentation(annotation.segmentation, height, width)
        except FormError as error:
            message = f"annotation {annotation.id} of image {image_id}: {error}; it cannot be used for masks"
            defects.append(Defect(message, error.kind, image_id, annotation.id))
    return defects
