"""One shard, from the image files to the tar: what a worker does, wherever it runs.

The bytes are a function of the input alone. Beside the finished tar lies a note of what went into it and what it holds,
so that a later run can tell that it is the one it would write.
"""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec

from shards import storage
from shards.defects import Defect
from shards.errors import ShardError
from shards.images import ImageFile, ImageSource, checksum, read_content, read_image
from shards.manifest import Shard
from shards.outlines import outline_defects
from shards.staging import Stage
from shards.tars import SEGMENTATIONS, TarMember, TarWriter, file_digest, sample_key


@dataclass(frozen=True)
class Sample:
    """One image and the JSON of it and its annotations, as the source has them."""

    image: ImageSource
    text: bytes
    annotations: list[bytes]


@dataclass(frozen=True)
class Part:
    """The samples of one shard in their order; ``folder`` is that of the images. Goes to other processes.

    ``write`` is false where it is clear by now that nothing will be written, and defects alone are asked for. ``masks`` is
    true where the source has segmentations, which are then looked at.
    """

    name: str
    folder: str
    samples: list[Sample]
    write: bool
    quarantine: bool
    masks: bool


class Place(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Where the members of a sample lie: encoded image, and segmentations (length 0 where it has none)."""

    image_id: int
    offset: int
    length: int
    crc32: int
    text_offset: int
    text_length: int
    text_crc32: int


class Written(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What became of a part.

    Attributes:
        shard: the tar; None where no sample is left for one.
        read: crc32 of each image file of the part, -1 where there was none.
        places: of the samples in the tar, in their order.
        defects: what was found in the image files and the segmentations.
    """

    shard: Shard | None
    read: tuple[int, ...]
    places: tuple[Place, ...]
    defects: tuple[Defect, ...]


def write_part(part: Part, stage: Stage, done: Callable[[int], None]) -> Written:
    """Write one shard, or take the finished one of a run that was stopped; ``done`` is told of images gone through.

    Raises ShardError where this process does not see the images or the stage, and OSError where it cannot write.
    """
    folder = storage.local_path(part.folder)
    if folder is not None and not folder.is_dir():
        raise ShardError(
            f"{part.folder}: no such folder of images on {socket.gethostname()}; expected images and --out to be visible "
            "from every process and node: give a shared folder or a URL"
        )
    if part.write:
        stage.check_visible()
        finished = _finished(part, stage)
        if finished is not None:
            done(len(part.samples))
            return finished
    read: list[int] = []
    places: list[Place] = []
    defects: list[Defect] = []
    failed = False
    with stage.draft(part.name) as draft:
        tar = TarWriter(draft.file)
        for sample in part.samples:
            image = read_image(part.folder, sample.image)
            read.append(image.crc32)
            defects += image.defects
            failed = failed or not (image.sound or part.quarantine)
            with _few_brackets(sample):
                if part.masks and image.sound:
                    _, _, width, height = sample.image
                    defects += outline_defects(sample.image.image_id, sample.annotations, height, width)
                if image.sound and part.write and not failed:
                    places.append(_add(tar, sample, image))
            done(1)
        draft.finished = bool(places) and not failed
        digest = tar.finish()
    shard = Shard(part.name, len(places), tar.bytes, digest) if draft.finished else None
    written = Written(shard, tuple(read), tuple(places), tuple(defects))
    if part.write and not failed:
        stage.write_note(part.name, msgspec.json.encode(written))
    return written


def sample_texts(sample: Sample) -> tuple[bytes, bytes]:
    """A sample's JSON, and that of its segmentations (empty where none of its annotations has one).

    They go apart: they are most of the text, and detection never reads them. Numbers stay as they are written.
    """
    annotations = [msgspec.json.decode(text, type=dict[str, msgspec.Raw]) for text in sample.annotations]
    segmentations = [annotation.pop("segmentation", _NULL) for annotation in annotations]
    entry = msgspec.json.encode({"image": msgspec.Raw(sample.text), "annotations": annotations})
    some = any(bytes(one) != b"null" for one in segmentations)
    text = msgspec.json.format(msgspec.json.encode(segmentations), indent=-1) if some else b""
    return msgspec.json.format(entry, indent=-1), text


@contextmanager
def _few_brackets(sample: Sample) -> Iterator[None]:
    """The deeper in calls a process is, the fewer brackets it can follow, so a worker may find too many first."""
    try:
        yield
    except RecursionError:
        who = f"image {sample.image.image_id} ({sample.image.name})"
        raise ShardError(
            f"{who}: brackets in its JSON are nested too deeply; expected COCO's instances format"
        ) from None


_NULL = msgspec.Raw(b"null")
_NO_MEMBER = TarMember("", 0, 0, 0)


def _add(tar: TarWriter, sample: Sample, image: ImageFile) -> Place:
    key = sample_key(sample.image.image_id)
    entry, text = sample_texts(sample)
    picture = tar.add(f"{key}.{image.extension}", image.content, image.crc32)
    tar.add(f"{key}.json", entry)
    texts = tar.add(key + SEGMENTATIONS, text) if text else _NO_MEMBER
    return Place(
        sample.image.image_id, picture.offset, picture.length, picture.crc32, texts.offset, texts.length, texts.crc32
    )


def _finished(part: Part, stage: Stage) -> Written | None:
    """The shard of an earlier run where it is whole and of the same images."""
    note = stage.read_note(part.name)
    if note is None:
        return None
    try:
        written = msgspec.json.decode(note, type=Written)
    except msgspec.DecodeError:
        return None
    if written.shard is not None and not _whole(storage.join(stage.url, part.name), written.shard):
        return None
    same = all(
        checksum(read_content(part.folder, sample.image.name)) == expected
        for sample, expected in zip(part.samples, written.read, strict=False)
    )
    return written if same and len(written.read) == len(part.samples) else None


def _whole(url: str, shard: Shard) -> bool:
    try:
        if storage.size(url) != shard.bytes:
            return False
    except FileNotFoundError:
        return False
    path = storage.local_path(url)
    # What was uploaded whole stays as it is; a local file may have been cut by a crash of the machine, or touched.
    return path is None or file_digest(path) == shard.sha256
