"""Write data sets of other formats: convert them to a COCO document in memory and hand that to `write_coco`.

A converter lists images, objects and categories; `write_coco` then checks, shards and reports as for a COCO file.
"""

import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import msgspec
from PIL import Image

from shards.config import WriteConfig
from shards.dataset.categories import Category
from shards.dataset.manifest import Manifest
from shards.dataset.tars import IMAGE_ENDINGS
from shards.source.defects import Defect, SourceError, Unconvertible, printable
from shards.workers import Progress
from shards.write.writer import Map, write_coco

# Suffixes of image files; the format itself is detected from the content.
IMAGE_SUFFIXES = frozenset("." + ending for ending in IMAGE_ENDINGS)
MAX_ID = 10**12 - 1


class ImageRecord(msgspec.Struct, gc=False):
    """An entry of the document's `images`; sizes in pixels."""

    id: int
    file_name: str
    width: int
    height: int


class ObjectRecord(msgspec.Struct, gc=False, omit_defaults=True):
    """An entry of the document's `annotations`; the box is x, y, width, height in pixels from the image's corner."""

    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    area: float
    iscrowd: int
    segmentation: list[list[float]] | None = None
    attributes: dict[str, str] | None = None


class _Content(msgspec.Struct):
    images: list[ImageRecord]
    annotations: list[ObjectRecord]
    categories: Sequence[Category]


@dataclass(frozen=True)
class Document:
    """A converted data set, ready for the writer.

    `root` is the folder it comes from, `images` the folder that file names are relative to, `content` COCO's instances
    JSON (the same for the same input), `lost` what could not be converted.
    """

    name: str
    root: Path
    images: Path
    content: bytes
    lost: Unconvertible


@dataclass(frozen=True)
class Labelled:
    """A converted image: size in pixels, objects (their ids are assigned later) and defects.

    An image of size 0 is lost. `lost` is the number of its objects that could not be converted.
    """

    width: int
    height: int
    objects: list[ObjectRecord]
    defects: list[Defect]
    lost: int = 0


def make_document(
    name: str,
    root: Path,
    images: Path,
    file_names: Sequence[str],
    labelled: Sequence[Labelled],
    categories: Sequence[Category],
    unpaired: Sequence[Defect],
) -> Document:
    """Join converted images into a document; ids of objects count from 1 in the order of images and objects.

    `file_names` are relative to `images` and sorted, one per item of `labelled`. `unpaired` has a defect for each image
    that lacks required labels and for each label file without an image.
    """
    content = _Content([], [], categories)
    defects, objects_lost = list(unpaired), 0
    for number, file_name, found in zip(image_ids(file_names), file_names, labelled, strict=True):
        image = found if printable(file_name) == file_name else _without_valid_name(file_name, found)
        defects += [msgspec.structs.replace(defect, image_id=number) for defect in image.defects]
        if image.width and image.height:
            content.images.append(ImageRecord(number, file_name, image.width, image.height))
            for record in image.objects:
                record.id, record.image_id = len(content.annotations) + 1, number
                content.annotations.append(record)
        objects_lost += image.lost
    images_lost = len(unpaired) + len(file_names) - len(content.images)
    lost = Unconvertible(images_lost, objects_lost, tuple(defects))
    return Document(name, root, images, msgspec.json.encode(content), lost)


def _without_valid_name(file_name: str, found: Labelled) -> Labelled:
    """Return the image as lost, with its objects: JSON cannot hold its name."""
    defect = Defect(f"{file_name}: its name is not UTF-8, which a COCO JSON cannot hold: rename it")
    return Labelled(0, 0, [], [*found.defects, defect], found.lost + len(found.objects))


def write_document(
    document: Document,
    out: str | os.PathLike[str],
    config: WriteConfig,
    progress: Progress | None = None,
    map: Map | None = None,
) -> Manifest:
    """Write the document's data set to `out` as `write_coco` does, with the same errors."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{document.name}.json"
        path.write_bytes(document.content)
        try:
            return write_coco(document.images, path, out, config, progress, map, document.lost)
        except SourceError as error:  # name the user's folder, not the temporary file
            defects = error.defects if error.report else (*document.lost.defects, *error.defects)
            raise SourceError(document.root, defects, error.report) from None


def image_ids(file_names: Sequence[str]) -> list[int]:
    """Return an id for each image: the number in its name, or its position.

    `2007_000027.jpg` gets 2007000027 and `000000008193.jpg` gets 8193 if every name is such a number of at most 12
    digits and no two are equal. Otherwise all ids are positions in `file_names`, from 1.
    """
    digits = [re.sub("[_-]", "", PurePosixPath(name).stem) for name in file_names]
    if all(text.isascii() and text.isdecimal() and int(text) <= MAX_ID for text in digits):
        numbers = [int(text) for text in digits]
        if len(set(numbers)) == len(numbers):
            return numbers
    return list(range(1, len(file_names) + 1))


def image_size(path: Path) -> tuple[int, int]:
    """Return width and height in pixels from an image's header, before EXIF rotation; raise `ValueError` if unreadable."""
    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:  # Pillow's plugins raise nearly anything for damaged bytes
        raise ValueError(f"its size cannot be read: {str(error).replace(str(path), path.name)}") from None
