"""Check of an image's PNG of segments against its entry in a panoptic JSON, when the image is written to a shard.

The PNG decides: a segment's box in the index is that of its pixels, and a segment without pixels is left out. The area
stays that of the JSON, which scoring takes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from shards.panoptic.segment_png import VOID, SegmentPngError, read_ids
from shards.panoptic.segments import Regions, find_regions
from shards.source.defects import Defect
from shards.source.images import NO_FILE, ImageSource, checksum, read_content


class MeasuredSegment(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A segment with pixels: its position among the image's segments, and the box of its pixels."""

    position: int
    x: int
    y: int
    width: int
    height: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The box as x, y, width, height."""
        return self.x, self.y, self.width, self.height


@dataclass(frozen=True)
class SegmentFile:
    """A PNG's bytes, their checksum, the segments that have pixels in it, and the defects of it and of them."""

    content: bytes
    crc32: int
    segments: tuple[MeasuredSegment, ...]
    defects: tuple[Defect, ...]
    sound: bool
    """True if the PNG can be used, though perhaps not every segment."""


class _Segment(msgspec.Struct, gc=False):
    id: int
    area: float
    bbox: tuple[float, float, float, float] | None = None


_segment = msgspec.json.Decoder(_Segment)


def read_segment_file(folder: str, name: str, image: ImageSource, segments: Sequence[bytes]) -> SegmentFile:
    """Read a PNG and compare it with the JSON of the image's segments; the content is empty if there is no such file."""
    label = f"image {image.image_id} ({image.name})"
    content = read_content(folder, name)
    crc32 = checksum(content)

    def unusable(kind: str, problem: str) -> SegmentFile:
        defect = Defect(f"{label}: its PNG {name} {problem}", kind, image.image_id)
        return SegmentFile(content or b"", crc32, (), (defect,), sound=False)

    if content is None:
        return unusable("missing-png", "is not in the folder of segments")
    try:
        ids = read_ids(content)
    except SegmentPngError as error:
        return unusable("bad-png", str(error))
    if ids.shape != (image.height, image.width):
        height, width = ids.shape
        return unusable("png-size", f"is {width}x{height} pixels, but the JSON says {image.width}x{image.height}")
    regions = find_regions(ids)
    entries = [_segment.decode(text) for text in segments]
    rows = {number: row for row, number in enumerate(regions.ids.tolist())}
    measured = tuple(
        MeasuredSegment(position, *_box(regions, rows[entry.id]))
        for position, entry in enumerate(entries)
        if entry.id in rows
    )
    return SegmentFile(
        content, crc32, measured, tuple(_defects(label, image.image_id, entries, regions, rows)), sound=True
    )


def source_checksum(image: int, png: int) -> int:
    """Return a checksum of an image and its PNG from those of both, or `NO_FILE` if either is missing."""
    return NO_FILE if NO_FILE in (image, png) else checksum(b"%d %d" % (image, png))


def _box(regions: Regions, row: int) -> tuple[int, int, int, int]:
    left, top, right, bottom = regions.corners[row].tolist()
    return left, top, right - left + 1, bottom - top + 1


def _defects(
    label: str, image_id: int, entries: Sequence[_Segment], regions: Regions, rows: dict[int, int]
) -> Iterator[Defect]:
    """Yield a defect for each difference between the JSON's segments and the regions of the PNG."""
    for entry in entries:
        row = rows.pop(entry.id, None)
        name = f"segment {entry.id} of image {image_id}"
        if row is None:
            text = f"{name}: has no pixels in the PNG"
            yield Defect(text, "segment-without-pixels", image_id, entry.id)
            continue
        pixels, box = int(regions.areas[row]), _box(regions, row)
        if entry.area != pixels:
            text = f"{name}: its area is {entry.area:g}, but it has {pixels} pixels; scoring takes the area as it is"
            yield Defect(text, "segment-area", image_id, entry.id)
        if entry.bbox is not None and entry.bbox != box:
            given = ", ".join(f"{number:.6g}" for number in entry.bbox)
            text = f"{name}: its box is [{given}], but its pixels have {list(box)}, which are taken"
            yield Defect(text, "segment-box", image_id, entry.id)
    for number, row in rows.items():
        if number != VOID:
            text = f"{label}: its PNG has {regions.areas[row]} pixels of id {number}, which no sound segment of its JSON has"
            yield Defect(text, "unlisted-segment", image_id, number)
