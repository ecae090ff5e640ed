"""Samples in WebDataset tars that were not written here: which files are one sample, what its JSON says, is it whole.

Files of one name up to the first dot, next to each other, are a sample. Its image is the file ``KEY.jpg`` (or another
ending of images), or else the only one of names like ``KEY.img.jpg``. Its annotations are in ``KEY.json``, or else in the
only ``KEY.*.json``, in one of these forms, with boxes as COCO's: x, y, width, height in pixels::

    {"image": {"id": 139, ...}, "annotations": [{"bbox": [...], "category_id": 3, ...}, ...]}     ours
    {"image_id": 139, "objects": [{"bbox": [...], "category": "cat", ...}, ...]}                    like COCO's
    [{"bbox": [...], "category_id": 3, ...}, ...]

Masks come from ``KEY.segmentation.json`` alone: a list with a COCO segmentation, or null, for each annotation. All other
files are left alone; nothing is ever unpickled.
"""

import itertools
import mmap
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from shards.columns import Int64
from shards.defects import Defect
from shards.errors import ShardError
from shards.images import Look, Unfit, look_at
from shards.manifest import Shard
from shards.tars import BLOCK, SEGMENTATIONS, TarMember, file_digest, image_members, scan_tar

_TWICE = "/"  # an ending that no file has


class Object(msgspec.Struct, gc=False):
    """One annotation as a foreign tar may hold it; the box is x, y, width, height in pixels."""

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
        """The category, by id or by name, whichever field says it."""
        said = (self.category_id, self.category, self.category_name, self.label)
        return next((one for one in said if one is not None), None)


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


_entry = msgspec.json.Decoder(list[Object] | _Entry)
_texts = msgspec.json.Decoder(list[msgspec.Raw])


@dataclass(frozen=True)
class ForeignSample:
    """One sound sample: its key, the places of its image and segmentations, what decoding showed, what its JSON says."""

    key: str
    image: TarMember
    text: TarMember | None
    look: Look
    image_id: int | None
    objects: list[Object]


@dataclass(frozen=True)
class ForeignTar:
    """One tar: ``shard`` describes it, ``found`` are its samples in their order, or what is wrong with one."""

    shard: Shard
    found: list[ForeignSample | Defect]


def read_tar(path: Path, name: str, annotated: bool) -> ForeignTar:
    """Look at every sample of the tar in ``path``, which is called ``name``.

    annotated: a sample without annotations is a defect; else it is an image without objects.

    Raises ShardError where the tar is not a whole one.
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
            except Unfit as error:
                kind, problem = error.args
                found.append(Defect(f"{name}: sample {key}: {problem}", kind))
    return ForeignTar(Shard(name, len(found), path.stat().st_size, file_digest(path)), found)


def _check_end(path: Path, content: mmap.mmap) -> None:
    """A tar that was cut between two files, or that another was appended to, looks whole to who reads file by file."""
    with tarfile.open(path, "r:") as tar:
        tar.getmembers()
        end = tar.offset
    if len(content) < end + 2 * BLOCK:
        raise ShardError(f"{path}: does not end as a tar does, so it may have been cut off: copy it again")
    if content[end:].strip(b"\0"):
        raise ShardError(f"{path}: something follows its end, such as another tar: make one tar of them, or two files")


def _grouped(members: list[TarMember]) -> Iterator[tuple[str, dict[str, TarMember]]]:
    """Keys and files by ending; files without an ending and those that webdataset keeps for itself belong to none."""
    named = (one for one in members if one.ending and not one.name.rpartition("/")[2].startswith("__"))
    for key, files in itertools.groupby(named, key=lambda member: member.key):
        found: dict[str, TarMember] = {}
        for member in files:
            found[member.ending if member.ending not in found else _TWICE] = member
        yield key, found


def _sample(key: str, files: dict[str, TarMember], content: mmap.mmap, annotated: bool) -> ForeignSample:
    """Raises Unfit with the kind of defect and the words for it."""
    if _TWICE in files:
        raise Unfit("malformed", f"holds {files[_TWICE].name} twice")
    image = _only("images", image_members(list(files.values())))
    if image is None:
        raise Unfit("malformed", f"has no image; got only {', '.join(sorted(files))}")
    look = look_at(_bytes(content, image))
    width, height = look.size
    text = files.get(SEGMENTATIONS[1:])
    json = _only("JSON files", [one for one in files.values() if one.name.endswith(".json") and one is not text])
    entry = _decoded(_bytes(content, json)) if json else _Entry()
    objects = entry.objects if entry.annotations is None else entry.annotations
    if objects is None and annotated:
        lacks = "its JSON has neither 'annotations' nor 'objects'" if json else "has no JSON"
        raise Unfit("malformed", f"{lacks}; got {', '.join(sorted(files))}")
    inner = entry.image if isinstance(entry.image, _Image) else _Image()
    for said in ((inner.width, inner.height), (entry.width, entry.height)):
        if None not in said and said != (width, height):
            raise Unfit(
                "wrong-size",
                f"is {width}x{height} pixels (before any EXIF rotation), but its JSON says {said[0]}x{said[1]}",
            )
    objects = objects or []
    if text is not None and not _fit(_bytes(content, text), len(objects)):
        raise Unfit(
            "malformed", f"{text.name} is no list with one segmentation for each of its {len(objects)} annotations"
        )
    ids = [one for one in (inner.id, entry.image_id, entry.id) if isinstance(one, int)]
    return ForeignSample(key, image, text, look, ids[0] if ids else None, objects)


def _only(what: str, members: Sequence[TarMember]) -> TarMember | None:
    """The one whose ending has no more dots, or else the only one; None where there is none."""
    plain = [one for one in members if "." not in one.ending] or members
    if len(plain) > 1:
        raise Unfit("malformed", f"has {len(plain)} {what}: {', '.join(one.name for one in plain)}; expected one")
    return plain[0] if plain else None


def _decoded(content: bytes) -> _Entry:
    try:
        found = _entry.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Unfit("malformed", f"its JSON: {str(error).replace('`', '')}") from None
    return _Entry(annotations=found) if isinstance(found, list) else found


def _fit(content: bytes, count: int) -> bool:
    try:
        return len(_texts.decode(content)) == count
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False


def _bytes(content: mmap.mmap, member: TarMember) -> bytes:
    return content[member.offset : member.offset + member.length]
