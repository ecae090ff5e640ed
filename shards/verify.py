"""Check a data set against its manifest, byte for byte."""

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from shards import storage
from shards.errors import ShardError
from shards.index import Records
from shards.manifest import Manifest, Shard, check_file, load_index, load_manifest
from shards.retry import StoreError
from shards.tars import TarMember, file_digest, image_members, scan_tar, text_members

# (shards checked, shards in all)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Report:
    """What was checked, and everything that is wrong, each in one line; ``ok`` where nothing is."""

    url: str
    images: int
    shards: int
    bytes: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the data set is exactly what was written."""
        return not self.problems


def verify(url: str | os.PathLike[str], progress: Progress | None = None) -> Report:
    """Hash every file of a data set again and compare every sample with the index.

    Damage is reported, not raised, and told as closely as possible: which shard is absent, truncated or changed, and
    which images of it are hit. Raises ShardError only where there is no manifest to check against.
    """
    manifest = load_manifest(url)
    problems = [problem for file in manifest.files if (problem := check_file(manifest, file.name)) is not None]
    images = None
    if not problems:
        try:
            images = load_index(manifest).images
        except ShardError as error:
            problems.append(str(error))
    for number, shard in enumerate(manifest.shards):
        records = None if images is None else images[images["shard"] == number]
        problems += _check_shard(manifest, shard, records)
        if progress is not None:
            progress(number + 1, len(manifest.shards))
    total = sum(shard.bytes for shard in manifest.shards)
    return Report(manifest.url, manifest.images, len(manifest.shards), total, tuple(problems))


def check_sizes(manifest: Manifest) -> None:
    """Look at every shard's size, without reading it: finds absent and truncated shards in moments.

    Raises ShardError naming the first that is not as the manifest says.
    """
    with ThreadPoolExecutor(16) as pool:  # a remote store takes tens of milliseconds for each answer
        for _ in pool.map(lambda shard: _check_size(storage.join(manifest.url, shard.name), shard), manifest.shards):
            pass


def _check_size(url: str, shard: Shard) -> None:
    try:
        length = storage.size(url)
    except FileNotFoundError:
        raise storage.absent(url) from None
    if length != shard.bytes:
        raise ShardError(
            f"{url}: got {length} bytes, expected {shard.bytes}: it is truncated or of another data set; copy it again"
        )


def _check_shard(manifest: Manifest, shard: Shard, records: Records | None) -> list[str]:
    url = storage.join(manifest.url, shard.name)
    try:
        length = storage.size(url)
        path = storage.local_path(url)
        if path is not None:
            with storage.naming(url):
                return _check_tar(url, path, length, shard, records)
        with tempfile.NamedTemporaryFile() as copy:
            storage.download(url, Path(copy.name))
            return _check_tar(url, Path(copy.name), length, shard, records)
    except FileNotFoundError:
        return [f"{url}: no such file; the manifest lists it with {shard.samples} images: copy it back"]
    except StoreError:
        raise
    except (ShardError, OSError) as error:
        return [str(error)]


def _check_tar(url: str, path: Path, length: int, shard: Shard, records: Records | None) -> list[str]:
    if length != shard.bytes:
        kind = "truncated" if length < shard.bytes else "too long"
        lost = 0 if records is None else int((records["offset"] + records["length"] > length).sum())
        hit = f", {lost} of its {shard.samples} images are lost" if lost else ""
        return [f"{url}: {kind}: got {length} bytes, expected {shard.bytes}{hit}: copy it again"]
    changed = file_digest(path) != shard.sha256
    try:
        members = scan_tar(path)
    except ShardError:
        members = []  # the hash says so as well
    problem = _difference(members, shard, records)
    if changed:
        where = problem or "its images are whole, but something beside them changed"
        return [f"{url}: its sha256 is not the manifest's: {where}: copy it again"]
    return [f"{url}: {problem}: write the data set again"] if problem else []


def _difference(members: list[TarMember], shard: Shard, records: Records | None) -> str | None:
    """What distinguishes a tar's samples from the manifest's count and the index's records."""
    images = image_members(members)
    if len(images) < shard.samples:  # a foreign sample may have more, such as masks
        return f"got {len(images)} images, expected {shard.samples}"
    if records is None:
        return None
    # By place and not by name, since names of foreign tars do not tell the id.
    for what, prefix, found in (("images", "", images), ("segmentations", "text_", text_members(members).values())):
        places = {_place(member) for member in found} | ({(0, 0, 0)} if prefix else set())
        fields = ("image_id", f"{prefix}offset", f"{prefix}length", f"{prefix}crc32")
        expected = zip(*(records[field].tolist() for field in fields), strict=True)
        wrong = [one for one, *place in expected if tuple(place) not in places]
        if wrong:
            return f"{what} of {len(wrong)} samples differ from the index, such as image {wrong[0]}"
    return None


def _place(member: TarMember) -> tuple[int, int, int]:
    return member.offset, member.length, member.crc32
