"""Write tars with fixed headers, and find the offsets of their members.

`webdataset.TarWriter` is not used: on COCO images it writes the same members, but takes 4.7 times the CPU time of a
plain copy with a hash instead of 2.5 times, and imports torch into every worker process (2.5 CPU seconds, 590 MB); the
bench case `writing` measures both.
"""

import hashlib
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from shards.errors import ShardError

IMAGE_ENDINGS = frozenset({"jpg", "jpeg", "jpe", "png", "webp", "bmp", "gif", "tif", "tiff"})  # of image files
SEGMENTATIONS = ".segmentation.json"  # ending of the member with a sample's segmentations
SEGMENTS = ".segments.png"  # the same of a panoptic data set; the image itself may be a .png
BLOCK = 512  # bytes; a header is one block, and contents are padded to whole blocks
_MAX_NAME, _MAX_BYTES = 100, 8**11 - 1


@dataclass(frozen=True)
class TarMember:
    """A file in a tar: name, offset and length of its content in bytes, and the content's crc32."""

    name: str
    offset: int
    length: int
    crc32: int

    @property
    def key(self) -> str:
        """The name up to the first dot after its folders, by which WebDataset groups files into samples."""
        return self.name.removesuffix("." + self.ending)

    @property
    def ending(self) -> str:
        """The rest of the name, which identifies the file inside its sample; empty when there is no dot."""
        return self.name.rpartition("/")[2].partition(".")[2]


class TarWriter:
    """Writer of tars whose bytes are a function of the members' names and contents alone.

    `bytes` is the number of bytes written so far.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.bytes = 0

    def add(self, name: str, content: bytes, crc32: int | None = None) -> TarMember:
        """Append a file; `crc32` is computed unless given."""
        crc32 = zlib.crc32(content) if crc32 is None else crc32
        member = TarMember(name, self.bytes + BLOCK, len(content), crc32)
        padding = bytes(-len(content) % BLOCK)
        for piece in (tar_header(name, len(content)), content, padding):
            self._write(piece)
        return member

    def finish(self) -> str:
        """Write the end of the tar and return its sha256."""
        self._write(bytes(2 * BLOCK))
        self._file.flush()
        return self._digest.hexdigest()

    def _write(self, piece: bytes) -> None:
        self._file.write(piece)
        self._digest.update(piece)
        self.bytes += len(piece)


def tar_header(name: str, length: int) -> bytes:
    """Return the ustar header of a read-only file that belongs to root and was last changed at 0."""
    encoded = name.encode("ascii")
    if len(encoded) > _MAX_NAME or length > _MAX_BYTES:
        raise ShardError(f"{name}: has {length} bytes, expected at most 100 letters of name and 8 GiB")
    size = b"%011o\0" % length
    checksum = _PLAIN_SUM + sum(encoded) + sum(size)
    return b"".join((encoded.ljust(_MAX_NAME, b"\0"), _BEFORE_SIZE, size, _TIME, b"%06o\0 " % checksum, _AFTER_SUM))


# Mode, user and group id; time; type, link name, magic, names of user and group, no device numbers, prefix and padding.
_BEFORE_SIZE = b"0000444\0" + b"0000000\0" * 2
_TIME = b"00000000000\0"
_AFTER_SUM = b"".join((b"0", bytes(100), b"ustar\x0000", b"root".ljust(32, b"\0") * 2, bytes(183)))
_PLAIN_SUM = (
    sum(_BEFORE_SIZE) + sum(_TIME) + sum(_AFTER_SUM) + 8 * ord(" ")
)  # the checksum's own field counts as blanks


def scan_tar(path: Path) -> list[TarMember]:
    """Return the files of a tar in their order; raise `ShardError` when the tar is incomplete or damaged."""
    members = []
    end = path.stat().st_size
    try:
        with tarfile.open(path, "r:", tarinfo=_sized(end)) as tar, path.open("rb") as file:
            for member in tar:
                if member.size < 0:  # an extended header may give a negative size
                    raise tarfile.ReadError(f"{member.name} has {member.size} bytes")
                if not member.isfile() or member.issparse():
                    continue  # a folder or a link, as in tars made by other tools
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError(f"{member.name} ends after the file does")
                file.seek(member.offset_data)
                crc32 = zlib.crc32(file.read(member.size))
                members.append(TarMember(member.name, member.offset_data, member.size, crc32))
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:  # nested long-name headers recurse
        raise ShardError(f"{path}: not a whole tar ({error}); copy it again") from None
    return members


def _sized(end: int) -> type[tarfile.TarInfo]:
    """Return a `TarInfo` that refuses sizes beyond a tar of `end` bytes.

    Python's own accepts any size, and then seeks backwards for ever or runs out of memory.
    """

    class Sized(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
            found = super().frombuf(buf, encoding, errors)
            if not 0 <= found.size <= end:
                raise tarfile.ReadError(f"{found.name} has {found.size} bytes in a tar of {end}")
            return found

    return Sized


def image_members(members: list[TarMember]) -> tuple[TarMember, ...]:
    """Return the members that are encoded images of samples."""
    return tuple(member for member in members if member.ending.rpartition(".")[2].lower() in IMAGE_ENDINGS)


def text_members(members: list[TarMember]) -> dict[str, TarMember]:
    """Return the members that hold segmentations, by the key of their sample; a sample may have none."""
    return {member.key: member for member in members if member.name.endswith((SEGMENTATIONS, SEGMENTS))}


def sample_key(image_id: int) -> str:
    """Return the key of an image's sample, with which the names of its files start."""
    return f"{image_id:012d}"


def file_digest(path: Path) -> str:
    """Return the sha256 of a local file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
