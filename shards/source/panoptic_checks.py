"""Checks of a panoptic JSON on whole columns: images paired with their PNGs, and segments; a defect for each problem."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from shards.arrays import Ints, Mask
from shards.dataset.categories import Category
from shards.panoptic.segment_png import MAX_SEGMENT_ID
from shards.source.checks import leaves_folder
from shards.source.columns import AnnotationColumns, ImageColumns, duplicated, positions, repeated
from shards.source.defects import Defect


def pair_images(
    images: ImageColumns,
    ids: Ints,
    file_names: list[str],
    malformed: set[int],
    known: Ints,
    last: int,
    has_png: Callable[[str], bool],
) -> tuple[Ints, list[str], list[Defect]]:
    """Return the rows of images with an annotation and a PNG, the names of these, and defects of the others.

    `ids` and `file_names` are those of the JSON's annotations, `malformed` the ids of images with one that is left out,
    `known` those of all listed images; ids above `last` are beyond a limit.
    """
    defects: list[Defect] = []
    for image_id in ids[~np.isin(ids, known) & (ids <= last)].tolist():
        defects.append(Defect(f"annotation of image {image_id}: no such image is listed", "unknown-image", image_id))
    twice = set(ids[repeated(ids)].tolist())
    found = positions(images.ids, ids) if len(ids) == len(set(ids.tolist())) else _first_positions(images.ids, ids)
    kept, names = list[int](), list[str]()
    for row, position in enumerate(found.tolist()):
        image_id = int(images.ids[row])
        label = f"image {image_id} ({images.names[row]})"
        if image_id in malformed:
            continue
        if position < 0:
            defects.append(
                Defect(f"{label}: has no annotation; expected one with its segments", "no-annotation", image_id)
            )
        elif image_id in twice:
            defects.append(Defect(f"{label}: has two annotations or more; expected one", "two-annotations", image_id))
        elif leaves_folder(name := file_names[position]):
            defects.append(
                Defect(f"{label}: the name {name} of its PNG leaves the folder of segments", image_id=image_id)
            )
        elif not has_png(name):
            defects.append(Defect(f"{label}: its PNG {name} is not in the folder of segments", "missing-png", image_id))
        else:
            kept.append(row)
            names.append(name)
    return np.array(kept, np.int64), names, defects


def _first_positions(values: Ints, known: Ints) -> Ints:
    """Return the first position of each value in `known`, which may have it several times; -1 if it is not there."""
    distinct, first = np.unique(known, return_index=True)
    found = positions(values, distinct)
    return np.where(found < 0, -1, first[found])


def check_segments(
    columns: AnnotationColumns, selected: Mask, images: ImageColumns, categories: tuple[Category, ...]
) -> tuple[Ints, Ints, list[Defect]]:
    """Check the `selected` segments of sound images; return the rows of the valid ones, those of their images, defects."""
    defects: list[Defect] = []
    owners = positions(columns.image_ids, images.ids)
    valid = selected & (owners >= 0)

    def note(kind: str, rows: Mask, problem: Callable[[int], str]) -> None:
        for row in np.flatnonzero(rows & valid).tolist():
            number, image_id = int(columns.ids[row]), int(columns.image_ids[row])
            defects.append(Defect(f"segment {number} of image {image_id}: {problem(row)}", kind, image_id, number))

    def reject(kind: str, rows: Mask, problem: Callable[[int], str]) -> None:
        note(kind, rows, problem)
        valid[rows] = False

    ids, category_ids = columns.ids, columns.category_ids
    known = np.array([category.id for category in categories], np.int64)
    things = np.array([bool(category.isthing) for category in categories])
    reject("bad-segment-id", (ids < 1) | (ids > MAX_SEGMENT_ID), lambda _: f"its id is not in 1..{MAX_SEGMENT_ID}")
    in_image = np.where(valid, owners * (MAX_SEGMENT_ID + 1) + ids, -1 - np.arange(len(ids)))
    reject(
        "duplicate-segment-id", duplicated(in_image), lambda _: "its id is given twice, so its pixels are of neither"
    )
    labels = positions(category_ids, known)
    reject("unknown-category", labels < 0, lambda row: f"its category {category_ids[row]} is not listed")
    bad_crowd = (columns.iscrowd != 0) & (columns.iscrowd != 1)
    reject("malformed", bad_crowd, lambda row: f"its iscrowd is {columns.iscrowd[row]}, not 0 or 1")
    bad_area = ~np.isfinite(columns.areas) | (columns.areas < 0)
    reject("malformed", bad_area, lambda row: f"its area is {columns.areas[row]:g}")
    stuff = ~things[labels]
    in_image = np.where(valid & stuff, owners * len(categories) + labels, -1 - np.arange(len(ids)))
    note(
        "repeated-stuff",
        duplicated(in_image),
        lambda row: f"its category {category_ids[row]} is stuff, and the image has it twice",
    )
    note(
        "stuff-crowd", stuff & (columns.iscrowd == 1), lambda row: f"is a crowd of stuff, category {category_ids[row]}"
    )
    rows = np.flatnonzero(valid)
    return rows, owners[rows], defects


def drop_notes_without_pixels(defects: Sequence[Defect]) -> list[Defect]:
    """Return the defects without notes about stuff of segments that the PNG lacks, and of what they alone repeated."""
    absent = {(each.image_id, each.annotation_id) for each in defects if each.kind == "segment-without-pixels"}
    notes = [each for each in defects if each.kind in ("repeated-stuff", "stuff-crowd")]
    kept = [each for each in notes if (each.image_id, each.annotation_id) not in absent]
    # Notes of the same category in an image have the same text after the segment's name.
    repeated = Counter(map(_repeated, kept))
    dropped = {id(each) for each in notes} - {
        id(each) for each in kept if each.kind == "stuff-crowd" or repeated[_repeated(each)] > 1
    }
    return [each for each in defects if id(each) not in dropped]


def _repeated(defect: Defect) -> tuple[int | None, str]:
    return defect.image_id, defect.text.partition(": ")[2]
