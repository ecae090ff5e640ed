"""Tars with fixed headers, and what lies where in one.

Headers are written here: Python's own cost as much as reading the image that they are for.
"""

import hashlib
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from shards.errors import ShardError

IMAGE_ENDINGS = frozenset({"jpg", "jpeg", "jpe", "png", "webp", "bmp", "gif", "tif", "tiff"})  # what images are called
SEGMENTATIONS = ".segmentation.json"  # ends the name of the member with the segmentations of a sample
BLOCK = 512  # bytes; a header is one, and contents are padded to whole ones
_MAX_NAME, _MAX_BYTES = 100, 8**11 - 1


@dataclass(frozen=True)
class TarMember:
    """One file in a tar: its name, where its bytes start, how many there are, and their crc32."""

    name: str
    offset: int
    length: int
    crc32: int

    @property
    def key(self) -> str:
        """What WebDataset groups files into samples by: the name up to the first dot behind its folders."""
        return self.name.removesuffix("." + self.ending)

    @property
    def ending(self) -> str:
        """The rest of the name, which says what a file is to its sample; empty where there is no dot."""
        return self.name.rpartition("/")[2].partition(".")[2]


class TarWriter:
    """Writes a tar from its first byte, whose bytes are a function of names and contents alone.

    Attributes:
        bytes: written so far.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.bytes = 0

    def add(self, name: str, content: bytes, crc32: int | None = None) -> TarMember:
        """Append a file, whose checksum may be known already."""
        crc32 = zlib.crc32(content) if crc32 is None else crc32
        member = TarMember(name, self.bytes + BLOCK, len(content), crc32)
        for piece in (tar_header(name, len(content)), content, bytes(-len(content) % BLOCK)):
            self._write(piece)
        return member

    def finish(self) -> str:
        """Write the end; returns the sha256 of all of it."""
        self._write(bytes(2 * BLOCK))
        self._file.flush()
        return self._digest.hexdigest()

    def _write(self, piece: bytes) -> None:
        self._file.write(piece)
        self._digest.update(piece)
        self.bytes += len(piece)


def tar_header(name: str, length: int) -> bytes:
    """The ustar header of a read-only file of user and group root, last changed at 0."""
    encoded = name.encode("ascii")
    if len(encoded) > _MAX_NAME or length > _MAX_BYTES:
        raise ShardError(f"{name}: has {length} bytes, expected at most 100 letters of name and 8 GiB")
    size = b"%011o\0" % length
    checksum = _PLAIN_SUM + sum(encoded) + sum(size)
    return b"".join((encoded.ljust(_MAX_NAME, b"\0"), _BEFORE_SIZE, size, _TIME, b"%06o\0 " % checksum, _BEHIND))


# mode, user and group id; time; type, link name, magic, names of user and group, no device numbers, prefix and padding.
_BEFORE_SIZE = b"0000444\0" + b"0000000\0" * 2
_TIME = b"00000000000\0"
_BEHIND = b"".join((b"0", bytes(100), b"ustar\x0000", b"root".ljust(32, b"\0") * 2, bytes(183)))
_PLAIN_SUM = sum(_BEFORE_SIZE) + sum(_TIME) + sum(_BEHIND) + 8 * ord(" ")  # the checksum's own field counts as blanks


def scan_tar(path: Path) -> list[TarMember]:
    """The files of a tar in their order.

    Raises ShardError where the tar is not whole.
    """
    members = []
    end = path.stat().st_size
    try:
        with tarfile.open(path, "r:", tarinfo=_sized(end)) as tar, path.open("rb") as file:
            for member in tar:
                if member.size < 0:  # as an extended header may say
                    raise tarfile.ReadError(f"{member.name} has {member.size} bytes")
                if not member.isfile() or member.issparse():
                    continue  # folders and links, which foreign tars have
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError(f"{member.name} ends after the file does")
                file.seek(member.offset_data)
                crc32 = zlib.crc32(file.read(member.size))
                members.append(TarMember(member.name, member.offset_data, member.size, crc32))
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:  # long names of long names recurse
        raise ShardError(f"{path}: not a whole tar ({error}); copy it again") from None
    return members


def _sized(end: int) -> type[tarfile.TarInfo]:
    """Headers of a tar of ``end`` bytes, read with care: Python's own would go by any size, back to where they were or
    to the end of memory."""

    class Sized(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
            found = super().frombuf(buf, encoding, errors)
            if not 0 <= found.size <= end:
                raise tarfile.ReadError(f"{found.name} has {found.size} bytes in a tar of {end}")
            return found

    return Sized


def image_members(members: list[TarMember]) -> tuple[TarMember, ...]:
    """Those of ``members`` that are the encoded images of samples."""
    return tuple(member for member in members if member.ending.rpartition(".")[2].lower() in IMAGE_ENDINGS)


def text_members(members: list[TarMember]) -> dict[str, TarMember]:
    """Those of ``members`` that hold segmentations, by the key of their sample; a sample may have none."""
    return {member.key: member for member in members if member.name.endswith(SEGMENTATIONS)}


def sample_key(image_id: int) -> str:
    """What the names of a sample's files begin with."""
    return f"{image_id:012d}"


def file_digest(path: Path) -> str:
    """sha256 of a local file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
