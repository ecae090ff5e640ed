"""Which images and annotations of a COCO JSON are sound: whole columns at a time, and a word for each that is not."""

from collections.abc import Callable
from pathlib import PurePosixPath

import numpy as np

from shards.columns import AnnotationColumns, Floats, ImageColumns, Mask, duplicated, positions, repeated
from shards.defects import Defect
from shards.index import Ints

MAX_IMAGE_ID = 10**12 - 1  # keys of samples have twelve digits
# Pixels that a box may reach beyond its image without a note: COCO's own are rounded to hundredths.
_SLACK = 0.5
_NO_NAMES = frozenset({"", ".", ".."})


def check_images(columns: ImageColumns, has_file: Callable[[str], bool]) -> tuple[Ints, list[Defect]]:
    """Rows of the sound images, and what is wrong with the others (not yet with their content).

    An entry that is listed twice with the same file and size counts once. Where entries of one id disagree, none can be
    trusted, as nothing says which of them its annotations are of.
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
    # Nearly all names are plain ones of files that are there, and nothing more is asked of them.
    odd = [row for row, name in enumerate(columns.names) if "/" in name or name in _NO_NAMES or not has_file(name)]
    for row in odd:
        name = columns.names[row]
        if _leaves_folder(name):
            reject(row, "malformed", "its file name leaves the folder of images")
        elif not has_file(name):
            reject(row, "missing-file", "no such file in the folder of images")
    return np.flatnonzero(keep), defects


def check_annotations(
    columns: AnnotationColumns, asked: Mask, images: ImageColumns, listed: Ints, categories: Ints
) -> tuple[Ints, Ints, list[Defect]]:
    """Rows of the sound ones of the annotations ``asked`` for, the row of each one's image, and what is wrong with the
    others or worth knowing.

    Those of images that are ``listed`` but not among ``images``, the sound ones, go without a word: their image had it.
    """
    defects: list[Defect] = []
    left = asked.copy()

    def say(kind: str, rows: Mask, problem: Callable[[int], str], keep: bool = False) -> None:
        for row in _rows(rows & left):
            number, image_id = int(columns.ids[row]), int(columns.image_ids[row])
            defects.append(Defect(f"annotation {number} of image {image_id}: {problem(row)}", kind, image_id, number))
        if not keep:
            left[rows] = False

    boxes, areas = columns.boxes, columns.areas
    sizes = boxes[:, 2:]

    def box(row: int) -> str:
        return f"box {numbers(row)} or area {areas[row]:.6g}"

    def numbers(row: int) -> str:
        return f"[{', '.join(f'{one:.6g}' for one in boxes[row])}]"

    say("duplicate-annotation-id", repeated(columns.ids), lambda row: "its id is given twice")
    say("unknown-image", ~np.isin(columns.image_ids, listed), lambda row: "no such image is listed")
    owners = positions(columns.image_ids, images.ids)
    left &= owners >= 0
    unknown = ~np.isin(columns.category_ids, categories)
    say("unknown-category", unknown, lambda row: f"its category {columns.category_ids[row]} is not listed")
    finite = np.isfinite(boxes).all(axis=1) & np.isfinite(areas)
    say("box-not-finite", ~finite, lambda row: f"its {box(row)} is not finite")
    negative = (sizes < 0).any(axis=1) | (areas < 0)
    say("box-negative", negative, lambda row: f"its {box(row)} is negative")
    odd = (columns.iscrowd != 0) & (columns.iscrowd != 1)
    say("malformed", odd, lambda row: f"its iscrowd is {columns.iscrowd[row]}, not 0 or 1")
    empty = (sizes == 0).any(axis=1)
    say("zero-area-box", empty, lambda row: f"its box {numbers(row)} has no area", keep=True)
    beyond, apart = _beyond(boxes, images, owners)
    say(
        "box-outside",
        (beyond > _SLACK) & ~apart,
        lambda row: f"its box {numbers(row)} reaches {beyond[row]:.6g} pixels beyond the image",
        keep=True,
    )
    say("box-off-image", apart, lambda row: f"its box {numbers(row)} lies wholly outside the image", keep=True)
    rows = np.flatnonzero(left)
    return rows, owners[rows], defects


def _duplicates(columns: ImageColumns) -> list[tuple[int, bool]]:
    """Rows to leave out because of their id, and whether all entries of that id agree."""
    by_id: dict[int, list[int]] = {}
    for row in _rows(duplicated(columns.ids)):
        by_id.setdefault(int(columns.ids[row]), []).append(row)
    found = []
    for rows in by_id.values():
        agreed = len({(columns.names[row], columns.widths[row], columns.heights[row]) for row in rows}) == 1
        found += [(row, agreed) for row in (rows[1:] if agreed else rows)]
    return found


def _leaves_folder(name: str) -> bool:
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or not path.parts


def _rows(mask: Mask) -> list[int]:
    return [int(row) for row in np.flatnonzero(mask)]


def _beyond(boxes: Floats, images: ImageColumns, owners: Ints) -> tuple[Floats, Mask]:
    """float64 [N]: how many pixels a box reaches beyond its image, negative inside; NaN without a sound image.
    bool [N]: whether all of it is outside; a box that ends at the edge is."""
    widths, heights = (np.append(column, 0)[owners] for column in (images.widths, images.heights))
    x, y, width, height = boxes.T
    with np.errstate(invalid="ignore", over="ignore"):  # the end of a finite box may be infinite
        reach = np.maximum.reduce([-x, -y, x + width - widths, y + height - heights])
        apart = (x >= widths) | (y >= heights) | (x + width <= 0) | (y + height <= 0)
    return np.where(owners < 0, np.nan, reach), apart & (reach > _SLACK) & (owners >= 0)
