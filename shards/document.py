"""Other formats through the writer's one door: a COCO document made in memory, beside its folder of images.

A converter lists images, objects and categories; ``write_coco`` then checks, shards and reports as it does for a file
that was COCO from the start.
"""

import os
import re
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import msgspec
from PIL import Image

from shards.config import WriteConfig
from shards.defects import Defect, Lost, SourceError, printable
from shards.manifest import Category, Manifest
from shards.tars import IMAGE_ENDINGS
from shards.write import Map, Progress, write_coco

# Endings by which a file in a folder is taken for an image; what it truly is, its content says.
IMAGE_SUFFIXES = frozenset("." + ending for ending in IMAGE_ENDINGS)
MAX_ID = 10**12 - 1

T = TypeVar("T")
R = TypeVar("R")


class ImageRecord(msgspec.Struct, gc=False):
    """One of the document's ``images``; sizes in pixels."""

    id: int
    file_name: str
    width: int
    height: int


class ObjectRecord(msgspec.Struct, gc=False, omit_defaults=True):
    """One of the document's ``annotations``; the box is x, y, width, height in pixels from the image's corner."""

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
    """A data set on its way to the writer.

    Attributes:
        name: what the data set is called.
        root: the folder that it comes from.
        images: the folder that file names are relative to.
        content: COCO's instances JSON; the same for the same input.
        lost: what could not be put into it.
    """

    name: str
    root: Path
    images: Path
    content: bytes
    lost: Lost


@dataclass(frozen=True)
class Labelled:
    """What a converter found out about one image: its size, its objects (ids yet to be given) and what is wrong.

    Without a size, the image is lost. ``lost`` counts its objects that are.
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
    """Join what was found into a document; ids of objects count from 1 in the order of images and objects.

    ``file_names`` are relative to ``images``, sorted, one for each of ``labelled``. ``unpaired`` name images without
    labels that need some, or labels without an image, one each.
    """
    content = _Content([], [], categories)
    defects, objects_lost = list(unpaired), 0
    for number, file_name, found in zip(image_ids(file_names), file_names, labelled, strict=True):
        one = found if printable(file_name) == file_name else _unnameable(file_name, found)
        defects += [msgspec.structs.replace(defect, image_id=number) for defect in one.defects]
        if one.width and one.height:
            content.images.append(ImageRecord(number, file_name, one.width, one.height))
            for record in one.objects:
                record.id, record.image_id = len(content.annotations) + 1, number
                content.annotations.append(record)
        objects_lost += one.lost
    images_lost = len(unpaired) + len(file_names) - len(content.images)
    lost = Lost(images_lost, objects_lost, tuple(defects))
    return Document(name, root, images, msgspec.json.encode(content), lost)


def _unnameable(file_name: str, found: Labelled) -> Labelled:
    """No JSON can hold such a name, so the image goes and its objects with it."""
    defect = Defect(f"{file_name}: its name is not UTF-8, which a COCO JSON cannot hold: rename it")
    return Labelled(0, 0, [], [*found.defects, defect], found.lost + len(found.objects))


def write_document(
    document: Document,
    out: str | os.PathLike[str],
    config: WriteConfig,
    progress: Progress | None = None,
    map: Map | None = None,
) -> Manifest:
    """Write the document's data set to ``out``, as ``write_coco`` does and with its errors."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{document.name}.json"
        path.write_bytes(document.content)
        try:
            return write_coco(document.images, path, out, config, progress, map, document.lost)
        except SourceError as error:  # the file that it names is gone by now
            defects = error.defects if error.report else (*document.lost.defects, *error.defects)
            raise SourceError(document.root, defects, error.report) from None


def image_ids(file_names: Sequence[str]) -> list[int]:
    """An id for each image: the number that its name is, or its position.

    ``2007_000027.jpg`` is 2007000027 and ``000000008193.jpg`` is 8193, where every name is such a number of at most 12
    digits and no two are the same. Otherwise all ids are positions in ``file_names``, from 1.
    """
    digits = [re.sub("[_-]", "", PurePosixPath(name).stem) for name in file_names]
    if all(text.isascii() and text.isdecimal() and int(text) <= MAX_ID for text in digits):
        numbers = [int(text) for text in digits]
        if len(set(numbers)) == len(numbers):
            return numbers
    return list(range(1, len(file_names) + 1))


def image_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels from an image's header, before any EXIF rotation; raises ValueError saying why not."""
    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:  # Pillow's plugins raise nearly anything for damaged bytes
        raise ValueError(f"its size cannot be read: {str(error).replace(str(path), path.name)}") from None


def each(
    function: Callable[[T], R], items: Sequence[T], workers: int, progress: Callable[[int, int], Any] | None
) -> list[R]:
    """``function`` of every item, in order, in ``workers`` threads (0: here): reading many small files takes waiting."""
    executor = ThreadPoolExecutor(max(1, workers), thread_name_prefix="convert")
    results: list[R] = []
    try:
        for result in executor.map(function, items) if workers else map(function, items):
            results.append(result)
            if progress is not None:
                progress(len(results), len(items))
    finally:
        executor.shutdown(cancel_futures=True)
    return results
