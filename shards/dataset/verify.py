"""Check a data set against its manifest, byte for byte."""

import os
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from shards.arrays import Records
from shards.dataset.manifest import Manifest, Shard, check_file, load_index, load_manifest
from shards.dataset.tars import TarMember, file_digest, image_members, scan_tar, text_members
from shards.errors import ShardError
from shards.store import storage
from shards.store.retry import StoreError
from shards.workers import Progress

_FIELDS = ("offset", "length", "crc32")


@dataclass(frozen=True)
class Report:
    """Result of a check: sizes of the data set, and its problems in one line each."""

    url: str
    images: int
    shards: int
    bytes: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """True when no problem was found."""
        return not self.problems


def verify(url: str | os.PathLike[str], progress: Progress | None = None) -> Report:
    """Hash every file of a data set and compare every sample with the index.

    `progress` counts shards. Damage is reported and not raised, as precisely as possible: which shard is missing, truncated or changed, and which
    of its images are affected. Raise `ShardError` only when there is no manifest to check against.
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
    """Compare the size of every shard with the manifest, without reading it.

    This finds missing and truncated shards fast. Raise `ShardError` naming the first shard that differs.
    """
    with ThreadPoolExecutor(16) as pool:  # each answer of a remote store takes tens of milliseconds
        for _ in pool.map(lambda shard: _check_size(storage.join(manifest.url, shard.name), shard), manifest.shards):
            pass


def _check_size(url: str, shard: Shard) -> None:
    try:
        length = storage.size(url)
    except FileNotFoundError:
        raise storage.missing_file_error(url) from None
    if length != shard.bytes:
        raise ShardError(
            f"{url}: got {length} bytes, expected {shard.bytes}: it is truncated or of another data set; copy it again"
        )


def _check_shard(manifest: Manifest, shard: Shard, records: Records | None) -> list[str]:
    url, text = storage.join(manifest.url, shard.name), "panoptic PNGs" if manifest.panoptic else "segmentations"
    try:
        length = storage.size(url)
        path = storage.local_path(url)
        if path is not None:
            with storage.error_context(url):
                return _check_tar(url, path, length, shard, records, text)
        with tempfile.NamedTemporaryFile() as copy:
            storage.download(url, Path(copy.name))
            return _check_tar(url, Path(copy.name), length, shard, records, text)
    except FileNotFoundError:
        return [f"{url}: no such file; the manifest lists it with {shard.samples} images: copy it back"]
    except StoreError:
        raise
    except (ShardError, OSError) as error:
        return [str(error)]


def _check_tar(url: str, path: Path, length: int, shard: Shard, records: Records | None, text: str) -> list[str]:
    if length != shard.bytes:
        kind = "truncated" if length < shard.bytes else "too long"
        lost = 0 if records is None else int((records["offset"] + records["length"] > length).sum())
        hit = f", {lost} of its {shard.samples} images are lost" if lost else ""
        return [f"{url}: {kind}: got {length} bytes, expected {shard.bytes}{hit}: copy it again"]
    changed = file_digest(path) != shard.sha256
    try:
        members = scan_tar(path)
    except ShardError:
        members = []  # the hash differs as well
    problem = _difference(members, shard, records, text)
    if changed:
        problem = problem or "its images are unchanged, but other bytes of it differ"
        return [f"{url}: its sha256 is not the manifest's: {problem}: copy it again"]
    return [f"{url}: {problem}: write the data set again"] if problem else []


def _difference(members: list[TarMember], shard: Shard, records: Records | None, text: str) -> str | None:
    """Return how a tar's samples differ from the manifest's count and the index's records, or None."""
    images = image_members(members)
    if len(images) < shard.samples:  # foreign samples may have more, such as masks
        return f"got {len(images)} images, expected {shard.samples}"
    if records is None:
        return None
    no_member = TarMember("", 0, 0, 0)  # a sample may have no segmentations
    return _wrong_samples("images", images, records, "") or _wrong_samples(
        text, [no_member, *text_members(members).values()], records, "text_"
    )


def _wrong_samples(kind: str, members: Iterable[TarMember], records: Records, prefix: str) -> str | None:
    """Compare members by offset, not by name: names in foreign tars do not give the image id."""
    found = {(member.offset, member.length, member.crc32) for member in members}
    ids, *columns = (records[name].tolist() for name in ("image_id", *(prefix + name for name in _FIELDS)))
    wrong = [
        image_id for image_id, expected in zip(ids, zip(*columns, strict=True), strict=True) if expected not in found
    ]
    return f"{kind} of {len(wrong)} samples differ from the index, such as image {wrong[0]}" if wrong else None
