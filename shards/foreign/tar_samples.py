"""Reading of samples in WebDataset tars that were written elsewhere.

Adjacent files with the same name up to the first dot are one sample. Its image is the file `KEY.jpg` (or with another
extension of images), or else the only file with a name like `KEY.img.jpg`. Its annotations are in `KEY.json`, or else
in the only `KEY.*.json`, in one of these forms, with boxes as in COCO: x, y, width, height in pixels.

    {"image": {"id": 139, ...}, "annotations": [{"bbox": [...], "category_id": 3, ...}, ...]}     this project's
    {"image_id": 139, "objects": [{"bbox": [...], "category": "cat", ...}, ...]}                    like COCO's
    [{"bbox": [...], "category_id": 3, ...}, ...]

Masks come from `KEY.segmentation.json` only: a list with a COCO segmentation, or null, for each annotation. All other
files are ignored; nothing is unpickled.
"""

import itertools
import mmap
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from shards.dataset.manifest import Shard
from shards.dataset.tars import BLOCK, SEGMENTATIONS, SEGMENTS, TarMember, file_digest, image_members, scan_tar
from shards.errors import ShardError
from shards.source.columns import Int64
from shards.source.defects import Defect
from shards.source.images import DecodedInfo, UnusableImage, inspect_image

_TWICE = "/"  # an extension that no file has


class Object(msgspec.Struct, gc=False):
    """An annotation in any of the supported forms; the box is x, y, width, height in pixels."""

    bbox: tuple[float, float, float, float]
    id: Int64 | str | None = None
    category_id: int | None = None
    category: int | str | None = None
    category_name: str | None = None
    label: int | str | None = None
    area: float | None = None
    iscrowd: Int64 | bool = 0

    @property
    def kind(self) -> int | str | None:
        """The category, as id or name, from the first field that has it."""
        for category in (self.category_id, self.category, self.category_name, self.label):
            if category is not None:
                return category
        return None


class _Image(msgspec.Struct):
    id: int | str | None = None
    width: int | None = None
    height: int | None = None


class _Entry(msgspec.Struct):
    annotations: list[Object] | None = None
    objects: list[Object] | None = None
    image: _Image | str | None = None
    image_id: int | str | None = None
    id: int | str | None = None
    width: int | None = None
    height: int | None = None
    segments: Any = None


_entry = msgspec.json.Decoder(list[Object] | _Entry)
_texts = msgspec.json.Decoder(list[msgspec.Raw])


@dataclass(frozen=True)
class ForeignSample:
    """A valid sample: its key, the tar members of image and segmentations, and the contents of image and JSON."""

    key: str
    image: TarMember
    text: TarMember | None
    info: DecodedInfo
    image_id: int | None
    objects: list[Object]


@dataclass(frozen=True)
class ForeignTar:
    """A tar: its description as a shard, and its samples in order, with a defect for each unusable one."""

    shard: Shard
    found: list[ForeignSample | Defect]


def read_tar(path: Path, name: str, annotated: bool) -> ForeignTar:
    """Read and check all samples of the tar at `path`; `name` is its name in the data set.

    annotated: a sample without annotations is a defect; otherwise it is an image without objects.

    Raise `ShardError` if the tar is damaged, empty or one of a panoptic data set.
    """
    members = scan_tar(path)
    if not members:
        raise ShardError(f"{path}: holds no files; expected a tar of samples: copy it again")
    found: list[ForeignSample | Defect] = []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        _check_end(path, content)
        for key, files in _grouped(members):
            try:
                found.append(_sample(key, files, content, annotated))
            except UnusableImage as error:
                kind, problem = error.args
                found.append(Defect(f"{name}: sample {key}: {problem}", kind))
    return ForeignTar(Shard(name, len(found), path.stat().st_size, file_digest(path)), found)


def _check_end(path: Path, content: mmap.mmap) -> None:
    """Raise `ShardError` for a tar that was cut off between two files, or to which another tar was appended.

    Readers that take member by member notice neither.
    """
    with tarfile.open(path, "r:") as tar:
        tar.getmembers()
        end = tar.offset
    if len(content) < end + 2 * BLOCK:
        raise ShardError(f"{path}: does not end as a tar does, so it may have been cut off: copy it again")
    if content[end:].strip(b"\0"):
        raise ShardError(f"{path}: something follows its end, such as another tar: make one tar of them, or two files")


def _grouped(members: list[TarMember]) -> Iterator[tuple[str, dict[str, TarMember]]]:
    """Yield the key and the files of each sample, by extension; a second file of one extension is at `_TWICE`.

    Files without an extension and those with names that webdataset reserves (`__...`) belong to no sample.
    """
    named = (member for member in members if member.ending and not member.name.rpartition("/")[2].startswith("__"))
    for key, group in itertools.groupby(named, key=lambda member: member.key):
        files: dict[str, TarMember] = {}
        for member in group:
            files[_TWICE if member.ending in files else member.ending] = member
        yield key, files


def _sample(key: str, files: dict[str, TarMember], content: mmap.mmap, annotated: bool) -> ForeignSample:
    """Return a sample; raise `UnusableImage` with the kind of the defect and a message if it cannot be used."""
    if _TWICE in files:
        raise UnusableImage("malformed", f"holds {files[_TWICE].name} twice")
    image = _only("images", image_members(list(files.values())))
    if image is None:
        raise UnusableImage("malformed", f"has no image; got only {', '.join(sorted(files))}")
    info = inspect_image(_bytes(content, image))
    width, height = info.size
    text = files.get(SEGMENTATIONS[1:])
    json_files = [file for file in files.values() if file.name.endswith(".json") and file is not text]
    json = _only("JSON files", json_files)
    entry = _decoded(_bytes(content, json)) if json else _Entry()
    if SEGMENTS[1:] in files and isinstance(entry.segments, str):
        raise ShardError(
            f"{files[SEGMENTS[1:]].name}: is of a panoptic data set, whose tars alone do not name its things; expected "
            "tars of boxes: copy its manifest.json and index/ beside the tars, or write it with `detr shard coco-panoptic`"
        )
    objects = entry.objects if entry.annotations is None else entry.annotations
    if objects is None and annotated:
        lacks = "its JSON has neither 'annotations' nor 'objects'" if json else "has no JSON"
        raise UnusableImage("malformed", f"{lacks}; got {', '.join(sorted(files))}")
    inner = entry.image if isinstance(entry.image, _Image) else _Image()
    for size in ((inner.width, inner.height), (entry.width, entry.height)):
        if None not in size and size != (width, height):
            raise UnusableImage(
                "wrong-size",
                f"is {width}x{height} pixels (before any EXIF rotation), but its JSON says {size[0]}x{size[1]}",
            )
    objects = objects or []
    if text is not None and not _fit(_bytes(content, text), len(objects)):
        raise UnusableImage(
            "malformed", f"{text.name} is no list with one segmentation for each of its {len(objects)} annotations"
        )
    ids = [value for value in (inner.id, entry.image_id, entry.id) if isinstance(value, int)]
    return ForeignSample(key, image, text, info, ids[0] if ids else None, objects)


def _only(what: str, members: Sequence[TarMember]) -> TarMember | None:
    """Return the member whose extension has no dot, or else the only member; None if there are no members.

    Raise `UnusableImage` if there are several.
    """
    plain = [member for member in members if "." not in member.ending]
    candidates = plain or members
    if len(candidates) > 1:
        names = ", ".join(member.name for member in candidates)
        raise UnusableImage("malformed", f"has {len(candidates)} {what}: {names}; expected one")
    return candidates[0] if candidates else None


def _decoded(content: bytes) -> _Entry:
    """Return the decoded JSON of a sample; raise `UnusableImage` if it is malformed."""
    try:
        decoded = _entry.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UnusableImage("malformed", f"its JSON: {str(error).replace('`', '')}") from None
    return _Entry(annotations=decoded) if isinstance(decoded, list) else decoded


def _fit(content: bytes, count: int) -> bool:
    """Return true if `content` is a JSON list of `count` segmentations."""
    try:
        return len(_texts.decode(content)) == count
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False


def _bytes(content: mmap.mmap, member: TarMember) -> bytes:
    return content[member.offset : member.offset + member.length]
