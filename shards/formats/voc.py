"""Convert Pascal VOC to a COCO document.

The input is a folder of the devkit with `JPEGImages`, `Annotations` and `ImageSets/Main`; a `VOCdevkit` that holds one
such folder; or a folder of images with an XML file beside each, as labelling tools write.

Boxes: the devkit's documentation says that "the top-left pixel in the image has coordinates (1,1)", and its evaluation
code counts `xmax - xmin + 1` pixels, so a box is `xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1` here, and a box
from 1 to the image's width covers all of it. Labels that count from 0, with xmax and ymax as edges, need `zero_based`.

Objects marked `difficult` become crowd regions by default, which training leaves out and scoring neither requires nor
counts as false: the devkit ignores them in its evaluation as well (but divides a detection's overlap with them by the
union, and COCO by the detection). `keep_difficult` makes them ordinary objects.
"""

import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ParseError

from shards.config import VocConfig
from shards.dataset.categories import Category, categories_from_names, read_categories
from shards.errors import ShardError
from shards.formats.document import IMAGE_SUFFIXES, Document, Labelled, ObjectRecord, image_size, make_document
from shards.source.defects import Defect
from shards.workers import Progress, thread_map

# In the order of the devkit (VOCinit.m), which other tools use for the labels as well.
NAMES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_KEPT = ("pose", "truncated", "occluded", "difficult")  # kept as attributes of an object


@dataclass(frozen=True)
class _Folder:
    root: Path
    images: Path
    annotations: Path
    image_of: dict[str, list[str]]  # file names of images by stem


@dataclass(frozen=True)
class _Object:
    name: str
    bbox: tuple[float, float, float, float]
    difficult: bool
    attributes: dict[str, str]


@dataclass(frozen=True)
class _File:
    """A parsed XML file: image size (0 if absent), objects, problems of others, and a fault of the whole file."""

    width: int
    height: int
    objects: list[_Object]
    problems: list[str]
    fault: str = ""


def voc_document(
    root: str | os.PathLike[str], config: VocConfig | None = None, progress: Progress | None = None
) -> Document:
    """Convert a VOC folder to a document; `progress` counts XML files.

    Raise `ShardError` when the folder has another layout. Problems of its files are in `Document.lost`.
    """
    config = config or VocConfig()
    folder = _folder(Path(root))
    xml = {path.stem for path in folder.annotations.glob("*.xml")}
    if not xml:
        raise ShardError(f"{folder.annotations}: has no XML files; expected Pascal VOC's, one for each image")
    stems, defects = _stems(folder, config.split, xml)
    # Read the names of other splits too, so that all splits have the same categories.
    others = [] if config.categories else sorted(xml.difference(stems))
    paths = [folder.annotations / f"{stem}.xml" for stem in [*stems, *others]]
    files = thread_map(lambda path: _read(path, config.zero_based), paths, config.workers, progress)
    if config.categories:
        categories = read_categories(config.categories, 1)
    else:
        categories = _categories({found.name for file in files for found in file.objects})
    chosen = list(zip(stems, files, strict=False))
    labelled = thread_map(lambda pair: _labelled(folder, *pair, categories, config), chosen, config.workers, None)
    name = f"{folder.root.name}-{config.split}" if config.split else folder.root.name
    file_names = [folder.image_of[stem][0] for stem in stems]
    return make_document(name, folder.root, folder.images, file_names, labelled, categories, defects)


def _folder(root: Path) -> _Folder:
    if not root.is_dir():
        raise ShardError(f"{root}: no such folder; expected one with JPEGImages and Annotations: check it for a typo")
    inner = [path.parent for pattern in ("*/Annotations", "VOCdevkit/*/Annotations") for path in root.glob(pattern)]
    if not (root / "Annotations").is_dir() and inner:
        if len(inner) > 1:
            listed = ", ".join(sorted(str(path) for path in inner))
            raise ShardError(f"{root}: holds {len(inner)} VOC folders; expected one: name one of {listed}")
        root = inner[0]
    images, annotations = root / "JPEGImages", root / "Annotations"
    if not annotations.is_dir():
        images = annotations = root  # as labelling tools write
    elif not images.is_dir():
        raise ShardError(f"{root}: has Annotations but no JPEGImages; expected Pascal VOC's folders: copy the images")
    image_of: dict[str, list[str]] = {}
    for name in sorted(os.listdir(images)):
        path = Path(name)
        if path.suffix.lower() in IMAGE_SUFFIXES:
            image_of.setdefault(path.stem, []).append(name)
    return _Folder(root.absolute(), images, annotations, image_of)


def _stems(folder: _Folder, split: str | None, xml: set[str]) -> tuple[list[str], list[Defect]]:
    """Return the stems of requested images that have both files, sorted, and the defects of the others."""
    wanted = sorted(xml.union(folder.image_of)) if split is None else _listed(folder.root, split)
    defects = []
    for stem in wanted:
        if stem not in folder.image_of:
            defects.append(Defect(f"{stem}: no image of that name in {folder.images.name}", "missing-file"))
        elif stem not in xml:
            defects.append(
                Defect(f"{folder.image_of[stem][0]}: no {stem}.xml in {folder.annotations.name}", "missing-file")
            )
        elif len(folder.image_of[stem]) > 1:
            defects.append(Defect(f"{stem}: several images of that name: {', '.join(folder.image_of[stem])}"))
    sound = {stem for stem in wanted if stem in xml and len(folder.image_of.get(stem, ())) == 1}
    twice = sorted(stem for stem, count in Counter(wanted).items() if count > 1 and stem in sound)
    defects += [Defect(f"{stem}: is listed twice in {split}.txt", "duplicate-image-id") for stem in twice]
    return sorted(sound), defects


def _listed(root: Path, split: str) -> list[str]:
    lists = root / "ImageSets" / "Main"
    try:
        lines = (lists / f"{split}.txt").read_text("utf-8", "surrogateescape").splitlines()  # as Python reads folders
    except OSError:
        # Lists of single classes, such as dog_train, have an underscore.
        found = sorted(path.stem for path in lists.glob("*.txt") if "_" not in path.stem)
        expected = f"one of {', '.join(found)}" if found else "lists of images, but there are none"
        raise ShardError(f"{lists}: has no {split}.txt; expected {expected}") from None
    columns = [line.split() for line in lines if line.strip()]
    if any(len(fields) > 1 for fields in columns):
        raise ShardError(f"{lists / split}.txt: is a list of one class; expected one name a line, as in trainval.txt")
    return [fields[0] for fields in columns]


def _categories(found: set[str]) -> tuple[Category, ...]:
    return categories_from_names(NAMES if found <= set(NAMES) else sorted(found), 1)


def _read(path: Path, zero_based: bool) -> _File:
    from defusedxml.common import DefusedXmlException
    from defusedxml.ElementTree import fromstring

    try:
        top = fromstring(path.read_bytes())
    except (OSError, ParseError, ValueError, LookupError, DefusedXmlException) as error:
        return _File(0, 0, [], [], f"cannot be read as XML: {type(error).__name__}: {error}".replace("\n", " "))
    objects, problems = [], []
    for number, element in enumerate(top.findall("object"), 1):
        try:
            objects.append(_object(element, zero_based))
        except ValueError as error:
            problems.append(f"object {number} ({element.findtext('name', '?').strip()}): {error}")
    try:
        size = top.find("size")
        width, height = int(_number(size, "width", "0")), int(_number(size, "height", "0"))
    except ValueError as error:
        return _File(0, 0, [], [], f"size: {error}")
    return _File(width, height, objects, problems)


def _object(element: Element, zero_based: bool) -> _Object:
    name = element.findtext("name", "").strip()
    if not name:
        raise ValueError("it has no name")
    box = element.find("bndbox")
    left, top, right, bottom = (_number(box, side) for side in ("xmin", "ymin", "xmax", "ymax"))
    first = 0 if zero_based else 1
    bbox = left - first, top - first, right - left + first, bottom - top + first
    if min(bbox[2:]) < 0:
        raise ValueError(f"its box has a negative size: {left:g}, {top:g} to {right:g}, {bottom:g}")
    kept = {key: text.strip() for key in _KEPT if (text := element.findtext(key))}
    return _Object(name, bbox, kept.get("difficult", "0") == "1", kept)


def _number(element: Any, side: str, default: str | None = None) -> float:
    text = default if element is None else element.findtext(side, default)
    if text is None:
        raise ValueError(f"it has no {side}")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"its {side} is {text.strip()!r}, not a number")
    return value


def _labelled(folder: _Folder, stem: str, file: _File, categories: tuple[Category, ...], config: VocConfig) -> Labelled:
    if file.fault:
        return Labelled(0, 0, [], [Defect(f"{stem}.xml: {file.fault}")])
    width, height = file.width, file.height
    if width < 1 or height < 1:  # some tools write 0, or nothing
        try:
            width, height = image_size(folder.images / folder.image_of[stem][0])
        except ValueError as error:
            return Labelled(0, 0, [], [Defect(f"{folder.image_of[stem][0]}: {error}", "not-an-image")])
    ids = {category.name: category.id for category in categories}
    defects = [Defect(f"{stem}.xml: {problem}") for problem in file.problems]
    objects = []
    for found in file.objects:
        if found.name not in ids:
            problem = f"{found.name!r} is not among the categories of {config.categories}"
            defects.append(Defect(f"{stem}.xml: {problem}", "unknown-category"))
            continue
        crowd = int(found.difficult and not config.keep_difficult)
        area = found.bbox[2] * found.bbox[3]
        objects.append(ObjectRecord(0, 0, ids[found.name], found.bbox, area, crowd, None, found.attributes or None))
    return Labelled(width, height, objects, defects, lost=len(defects))
