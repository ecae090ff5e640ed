"""What lies where in a tar: the index of a shard is made by looking, so a foreign tar can be indexed as well."""

import hashlib
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from shards.errors import ShardError

IMAGE_ENDINGS = frozenset({"jpg", "jpeg", "jpe", "png", "webp", "bmp", "gif", "tif", "tiff"})  # what images are called
SEGMENTATIONS = ".segmentation.json"  # ends the name of the member with the segmentations of a sample


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


def scan_tar(path: Path) -> list[TarMember]:
    """The files of a tar in their order.

    Raises ShardError where the tar is not whole.
    """
    members = []
    end = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar, path.open("rb") as file:
            for member in tar:
                if not member.isfile() or member.issparse():
                    continue  # folders and links, which foreign tars have
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError(f"{member.name} ends after the file does")
                file.seek(member.offset_data)
                crc32 = zlib.crc32(file.read(member.size))
                members.append(TarMember(member.name, member.offset_data, member.size, crc32))
    except tarfile.TarError as error:
        raise ShardError(f"{path}: not a whole tar ({error}); copy it again") from None
    return members


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
