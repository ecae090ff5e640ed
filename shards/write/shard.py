"""Write one shard from its image files, in any process or on any node.

The bytes are a function of the input alone. A note beside the finished tar lists its images and contents, so that a
later run can recognise it as the shard it would write.
"""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec

from shards.dataset.manifest import Shard
from shards.dataset.tars import SEGMENTATIONS, SEGMENTS, TarMember, TarWriter, file_digest, sample_key
from shards.errors import ShardError
from shards.source.checks import outline_defects
from shards.source.defects import Defect
from shards.source.images import ImageFile, ImageSource, checksum, read_content, read_image
from shards.source.segments import MeasuredSegment, SegmentFile, read_segment_file, source_checksum
from shards.store import storage
from shards.write.staging import Stage


@dataclass(frozen=True)
class SourceSample:
    """An image, its entry and annotations as JSON text of the source, and the name of its PNG in a panoptic source."""

    image: ImageSource
    text: bytes
    annotations: list[bytes]
    png: str = ""


@dataclass(frozen=True)
class ShardJob:
    """A shard to be written: its samples in their order, and the folder or URL of their images. Picklable.

    Without `write` the shard is only checked for defects, as the data set cannot be written anyway. `masks`: the source
    has segmentations, so check them too. `segments`: folder or URL of the PNGs of a panoptic source, else empty.
    """

    name: str
    folder: str
    samples: list[SourceSample]
    write: bool
    quarantine: bool
    masks: bool
    segments: str = ""


class MemberOffsets(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Offsets of a sample's members: encoded image, and segmentations or PNG (length 0 when there are none)."""

    image_id: int
    offset: int
    length: int
    crc32: int
    text_offset: int
    text_length: int
    text_crc32: int


class ShardResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Result of writing a shard.

    `shard` is the tar, or None when it has no samples or was not to be written; `read` a checksum of each image file,
    with its PNG if it has one, -1 when it is missing; `members` the samples in the tar, in their order; `defects` those
    of image files, segmentations and PNGs; `segments` those of each member, in panoptic data.
    """

    shard: Shard | None
    read: tuple[int, ...]
    members: tuple[MemberOffsets, ...]
    defects: tuple[Defect, ...]
    segments: tuple[tuple[MeasuredSegment, ...], ...] = ()


def write_shard(job: ShardJob, stage: Stage, done: Callable[[int], None]) -> ShardResult:
    """Write one shard, or reuse the finished one of a stopped run; call `done` with the number of images processed.

    Raise `ShardError` when this process does not see the images, the PNGs or the stage, and `OSError` when it cannot
    write.
    """
    _check_visible(job.folder, "images")
    if job.segments:
        _check_visible(job.segments, "segments")
    if job.write:
        stage.check_visible()
        finished = _finished(job, stage)
        if finished is not None:
            done(len(job.samples))
            return finished
    read: list[int] = []
    members: list[MemberOffsets] = []
    defects: list[Defect] = []
    segments: list[tuple[MeasuredSegment, ...]] = []
    failed = False
    with stage.draft(job.name) as draft:
        tar = TarWriter(draft.file)
        for sample in job.samples:
            image = read_image(job.folder, sample.image)
            defects += image.defects
            with _refuse_deep_nesting(sample):
                png = None
                if job.segments:
                    png = read_segment_file(job.segments, sample.png, sample.image, sample.annotations)
                    defects += png.defects
                read.append(image.crc32 if png is None else source_checksum(image.crc32, png.crc32))
                sound = image.sound and (png is None or png.sound)
                rejected = not sound or (png is not None and any(defect.rejected for defect in png.defects))
                failed = failed or (rejected and not job.quarantine)
                if job.masks and sound:
                    _, _, width, height = sample.image
                    defects += outline_defects(sample.image.image_id, sample.annotations, height, width)
                if sound and job.write and not failed:
                    members.append(_add(tar, sample, image) if png is None else _add_panoptic(tar, sample, image, png))
                    segments += [] if png is None else [png.segments]
            done(1)
        draft.finished = bool(members) and not failed
        digest = tar.finish()
    shard = Shard(job.name, len(members), tar.bytes, digest) if draft.finished else None
    written = ShardResult(shard, tuple(read), tuple(members), tuple(defects), tuple(segments))
    if job.write and not failed:
        stage.write_note(job.name, msgspec.json.encode(written))
    return written


def sample_texts(sample: SourceSample) -> tuple[bytes, bytes]:
    """Return a sample's JSON, and that of its segmentations (empty when none of its annotations has one).

    Segmentations are a member of their own: they are most of the text, and detection never reads them. Numbers keep the
    digits of the source.
    """
    annotations = [msgspec.json.decode(text, type=dict[str, msgspec.Raw]) for text in sample.annotations]
    segmentations = [annotation.pop("segmentation", _NULL) for annotation in annotations]
    entry = msgspec.json.encode({"image": msgspec.Raw(sample.text), "annotations": annotations})
    text = b""
    if any(bytes(segmentation) != b"null" for segmentation in segmentations):
        text = msgspec.json.format(msgspec.json.encode(segmentations), indent=-1)
    return msgspec.json.format(entry, indent=-1), text


def _check_visible(url: str, files: str) -> None:
    folder = storage.local_path(url)
    if folder is not None and not folder.is_dir():
        raise ShardError(
            f"{url}: no such folder of {files} on {socket.gethostname()}; expected {files} and --out to be visible "
            "from every process and node: give a shared folder or a URL"
        )


@contextmanager
def _refuse_deep_nesting(sample: SourceSample) -> Iterator[None]:
    """Raise `ShardError` for JSON that nests too deeply.

    The source was parsed before, but a worker may have less of the recursion limit left than the parent had.
    """
    try:
        yield
    except RecursionError:
        name = f"image {sample.image.image_id} ({sample.image.name})"
        raise ShardError(f"{name}: its JSON is nested too deeply; expected COCO's instances format") from None


_NULL = msgspec.Raw(b"null")
_NO_MEMBER = TarMember("", 0, 0, 0)


def _add(tar: TarWriter, sample: SourceSample, image: ImageFile) -> MemberOffsets:
    key = sample_key(sample.image.image_id)
    entry, text = sample_texts(sample)
    encoded = tar.add(f"{key}.{image.extension}", image.content, image.crc32)
    tar.add(f"{key}.json", entry)
    segmentations = tar.add(key + SEGMENTATIONS, text) if text else _NO_MEMBER
    return MemberOffsets(
        image_id=sample.image.image_id,
        offset=encoded.offset,
        length=encoded.length,
        crc32=encoded.crc32,
        text_offset=segmentations.offset,
        text_length=segmentations.length,
        text_crc32=segmentations.crc32,
    )


def _add_panoptic(tar: TarWriter, sample: SourceSample, image: ImageFile, png: SegmentFile) -> MemberOffsets:
    """Append image, PNG and JSON; the JSON lists the segments that have pixels, with all fields of the source."""
    key = sample_key(sample.image.image_id)
    kept = [msgspec.Raw(sample.annotations[segment.position]) for segment in png.segments]
    entry = msgspec.json.encode({"image": msgspec.Raw(sample.text), "segments": sample.png, "annotations": kept})
    encoded = tar.add(f"{key}.{image.extension}", image.content, image.crc32)
    ids = tar.add(key + SEGMENTS, png.content, png.crc32)
    tar.add(f"{key}.json", msgspec.json.format(entry, indent=-1))
    places = encoded.offset, encoded.length, encoded.crc32, ids.offset, ids.length, ids.crc32
    return MemberOffsets(sample.image.image_id, *places)


def _finished(job: ShardJob, stage: Stage) -> ShardResult | None:
    """Return the shard of an earlier run if it is complete and of the same images."""
    note = stage.read_note(job.name)
    if note is None:
        return None
    try:
        written = msgspec.json.decode(note, type=ShardResult)
    except msgspec.DecodeError:
        return None
    if written.shard is not None and not _is_complete(storage.join(stage.url, job.name), written.shard):
        return None
    same = all(_checksum(job, sample) == expected for sample, expected in zip(job.samples, written.read, strict=False))
    return written if same and len(written.read) == len(job.samples) else None


def _checksum(job: ShardJob, sample: SourceSample) -> int:
    image = checksum(read_content(job.folder, sample.image.name))
    if not job.segments:
        return image
    return source_checksum(image, checksum(read_content(job.segments, sample.png)))


def _is_complete(url: str, shard: Shard) -> bool:
    try:
        if storage.size(url) != shard.bytes:
            return False
    except FileNotFoundError:
        return False
    path = storage.local_path(url)
    # An uploaded file is complete; a local one may have been truncated by a crash of the machine, or changed.
    return path is None or file_digest(path) == shard.sha256
