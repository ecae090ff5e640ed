"""Convert a folder of YOLO labels to a COCO document.

A label file has a line for each object, `class x y width height`: the class counts from 0, and the box's centre and
size are fractions of the image's width and height. A line of a class and three or more points is a polygon; it is kept
as the segmentation, with the box around it. An image without a label file has no objects, and is reported; one with an
empty file has none either.

The paths of label files are those of the images, with `labels` instead of `images`:

    ROOT/images/a.jpg        ROOT/labels/a.txt
    ROOT/images/train/a.jpg  ROOT/labels/train/a.txt     (split train)
    ROOT/train/images/a.jpg  ROOT/train/labels/a.txt     (split train)

The names of the classes are `names` of `data.yaml` (or of the only YAML file there), `classes.txt` or `obj.names`.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from shards.config import YoloConfig
from shards.dataset.categories import Category, read_categories
from shards.errors import ShardError
from shards.formats.document import IMAGE_SUFFIXES, Document, Labelled, ObjectRecord, image_size, make_document
from shards.source.defects import Defect
from shards.workers import Progress, thread_map

_NAME_FILES = ("classes.txt", "labels/classes.txt", "obj.names")
_DECIMALS = 4  # of coordinates in pixels; labels have six decimals of an image's side


class _DataYaml(msgspec.Struct):
    names: list[str] | dict[int, str]
    kpt_shape: list[int] | None = None


def yolo_document(
    root: str | os.PathLike[str], config: YoloConfig | None = None, progress: Progress | None = None
) -> Document:
    """Convert a folder of YOLO labels to a document; `progress` counts images.

    Raise `ShardError` when the folder has another layout. Problems of its files are in `Document.lost`.
    """
    config = config or YoloConfig()
    top = Path(root)
    images, labels = _folders(top, config.split)
    categories = _categories(top, config.categories)
    known = {category.id for category in categories}
    file_names = sorted(_files(images, IMAGE_SUFFIXES))
    if not file_names:
        raise ShardError(f"{images}: has no images; expected a folder of images: check --root and --split")
    defects = _orphans(labels, file_names)
    labelled = thread_map(lambda name: _labelled(images, labels, name, known), file_names, config.workers, progress)
    if not any(image.objects or any(defect.rejected for defect in image.defects) for image in labelled):
        raise ShardError(
            f"{labels}: none of the {len(file_names)} images has an object; expected a label file for some"
        )
    name = f"{top.absolute().name}-{config.split}" if config.split else top.absolute().name
    return make_document(name, top, images, file_names, labelled, categories, defects)


def _folders(root: Path, split: str | None) -> tuple[Path, Path]:
    """Return the folders of images and of labels."""
    if not root.is_dir():
        raise ShardError(f"{root}: no such folder; expected one with images and labels: check it for a typo")
    choices = [("images", "labels")]
    if split is not None:
        choices = [(f"images/{split}", f"labels/{split}"), (f"{split}/images", f"{split}/labels")]
    for images, labels in choices:
        if (root / images).is_dir():
            if not (root / labels).is_dir():
                raise ShardError(f"{root}: has {images} but no {labels}; expected a folder of label files")
            return root / images, root / labels
    splits = sorted({path.parent.name if path.name == "images" else path.name for path in _split_folders(root)})
    hint = f"the splits here are {', '.join(splits)}" if splits else "see `detr shard yolo --help`"
    raise ShardError(f"{root}: has no folder {' or '.join(images for images, _ in choices)}; {hint}")


def _split_folders(root: Path) -> list[Path]:
    return [path for pattern in ("images/*", "*/images") for path in root.glob(pattern) if path.is_dir()]


def _files(folder: Path, suffixes: frozenset[str]) -> Iterator[str]:
    """Yield the names of files at any depth, relative to `folder`."""
    for path, _, names in os.walk(folder):
        inside = Path(path).relative_to(folder)
        yield from ((inside / name).as_posix() for name in names if Path(name).suffix.lower() in suffixes)


def _orphans(labels: Path, file_names: list[str]) -> list[Defect]:
    stems = {os.path.splitext(name)[0] for name in file_names}
    found = sorted(_files(labels, frozenset({".txt"})))
    orphans = [name for name in found if os.path.splitext(name)[0] not in stems and Path(name).name != "classes.txt"]
    return [Defect(f"{labels.name}/{name}: no image of that name", "missing-file") for name in orphans]


def _categories(root: Path, chosen: Path | None) -> tuple[Category, ...]:
    if chosen is not None:
        return _from_yaml(chosen) if chosen.suffix.lower() in (".yaml", ".yml") else read_categories(chosen, 0)
    found = sorted([*root.glob("*.yaml"), *root.glob("*.yml")])
    named = [path for path in found if path.stem == "data"]
    if named or len(found) == 1:
        return _from_yaml((named or found)[0])
    for name in _NAME_FILES:
        if (root / name).is_file():
            return read_categories(root / name, 0)
    several = f"{len(found)} YAML files, none called data.yaml" if found else f"no data.yaml and no {_NAME_FILES[0]}"
    raise ShardError(f"{root}: has {several}, so the names of its classes are unknown: give them by --categories FILE")


def _from_yaml(path: Path) -> tuple[Category, ...]:
    try:
        data = msgspec.yaml.decode(path.read_bytes(), type=_DataYaml)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ShardError(f"{path}: {error}; expected YOLO's data.yaml with 'names'".replace("\n", " ")) from None
    if data.kpt_shape is not None:
        raise ShardError(
            f"{path}: describes key points (kpt_shape), which the labels then hold; expected boxes or outlines"
        )
    names = dict(enumerate(data.names)) if isinstance(data.names, list) else data.names
    if not names or min(names) < 0:
        raise ShardError(f"{path}: names no classes, or one below 0; expected names of classes from 0")
    return tuple(Category(number, names[number]) for number in sorted(names))


def _labelled(images: Path, labels: Path, name: str, known: set[int]) -> Labelled:
    label = os.path.splitext(name)[0] + ".txt"
    try:
        width, height = image_size(images / name)
    except ValueError as error:
        return Labelled(0, 0, [], [Defect(f"{images.name}/{name}: {error}", "not-an-image")])
    objects, defects = [], []
    try:
        lines = (labels / label).read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        lines = []
        note = f"{labels.name}/{label}: no such file, so its image has no objects"
        defects.append(Defect(note, "no-label-file"))
    except (OSError, UnicodeDecodeError) as error:
        return Labelled(0, 0, [], [Defect(f"{labels.name}/{label}: cannot be read: {error}")])
    for number, line in enumerate(lines, 1):
        fields = line.split()
        try:
            if fields:
                objects.append(_object(fields, known, width, height))
        except ValueError as error:
            defects.append(Defect(f"{labels.name}/{label} line {number}: {error}"))
    return Labelled(width, height, objects, defects, lost=sum(defect.rejected for defect in defects))


def _object(fields: list[str], known: set[int], width: int, height: int) -> ObjectRecord:
    """Parse a line of labels; raise `ValueError` with what is wrong with it."""
    try:
        numbers = [float(field) for field in fields]
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"got {' '.join(fields)[:60]!r}, expected numbers")
    class_, coordinates = numbers[0], numbers[1:]
    if len(coordinates) != 4 and (len(coordinates) < 6 or len(coordinates) % 2):
        raise ValueError(
            f"got {len(numbers)} numbers, expected a class and x, y, width, height, or three points or more"
        )
    if class_ not in known:
        raise ValueError(f"got class {fields[0]}, expected one of the {len(known)} that have names")
    if min(coordinates) < 0 or max(coordinates) > 1:
        raise ValueError(
            f"got {min(coordinates):g}..{max(coordinates):g}, expected fractions of the image's sides, 0 to 1"
        )
    segmentation = None
    if len(coordinates) == 4:
        x, y, across, down = coordinates
        left, top, area = (x - across / 2) * width, (y - down / 2) * height, across * width * down * height
        box = left, top, across * width, down * height
    else:
        xs, ys = [x * width for x in coordinates[::2]], [y * height for y in coordinates[1::2]]
        box = min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
        area = abs(sum(xs[i - 1] * ys[i] - xs[i] * ys[i - 1] for i in range(len(xs)))) / 2
        segmentation = [[round(value, _DECIMALS) for point in zip(xs, ys, strict=True) for value in point]]
    left, top, across, down = (round(value, _DECIMALS) for value in box)
    return ObjectRecord(0, 0, int(class_), (left, top, across, down), round(area, _DECIMALS), 0, segmentation)
