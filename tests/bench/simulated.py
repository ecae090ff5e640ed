"""A data set of any size that repeats the samples of a small real one, so that only an index is written.

Every shard is a link to the one real shard, so each sample can also be read.
"""

import functools
import hashlib
import os
from pathlib import Path

import msgspec
import numpy as np

from shards.config import WriteConfig
from shards.dataset.index import ANNOTATION_DTYPE
from shards.dataset.listed_files import File
from shards.dataset.manifest import ANNOTATIONS_NAME, IMAGES_NAME, MANIFEST_NAME, Manifest, Shard
from shards.write.writer import write_coco
from tests.support.real_data import COCO_TINY as COCO

COCO_IMAGES, COCO_ANNOTATIONS = 118_287, 860_001  # of train2017
_PER_SHARD = 1000


@functools.cache
def real_sizes() -> tuple[np.ndarray, np.ndarray]:
    """Return widths and heights of the real images, of both splits."""
    sizes = []
    for name in ("train", "val"):
        content = (COCO / "annotations" / f"instances_{name}2017.json").read_bytes()
        sizes += [(image["width"], image["height"]) for image in msgspec.json.decode(content)["images"]]
    widths, heights = np.array(sizes).T
    return widths, heights


def write_simulated(folder: Path, images: int = COCO_IMAGES, annotations: int = COCO_ANNOTATIONS) -> Path:
    """Write the data set and return its folder."""
    real = write_coco(
        COCO / "train2017", COCO / "annotations" / "instances_train2017.json", folder / "real", WriteConfig()
    )
    index, out = real.index(), folder / "simulated"
    (out / "index").mkdir(parents=True)
    rows = np.arange(images)
    records = np.array(index.images)[rows % real.images]
    records["image_id"], records["shard"] = rows, rows // _PER_SHARD
    boxes = np.resize(np.array(index.annotations), annotations).astype(ANNOTATION_DTYPE)
    ends = np.arange(images + 1) * annotations // images
    records["first"], records["count"] = ends[:-1], np.diff(ends)
    boxes["image"] = np.repeat(rows, records["count"])
    boxes["annotation_id"] = np.arange(annotations)
    shards = []
    for number, start in enumerate(range(0, images, _PER_SHARD)):
        name, samples = f"shard-{number:06d}.tar", min(_PER_SHARD, images - start)
        os.link(folder / "real" / real.shards[0].name, out / name)
        shards.append(Shard(name, samples, real.shards[0].bytes, real.shards[0].sha256))
    files = [_save(out, IMAGES_NAME, records), _save(out, ANNOTATIONS_NAME, boxes)]
    manifest = msgspec.structs.replace(
        real,
        url="",
        images=images,
        annotations=annotations,
        shards=tuple(shards),
        files=tuple(files),
        samples_per_shard=_PER_SHARD,
    )
    (out / MANIFEST_NAME).write_bytes(manifest.to_json())
    return out


def plain(images: int) -> Manifest:
    """Return the fields of a manifest that a plan needs, for a data set that does not exist."""
    shards = tuple(Shard(f"{start}", min(_PER_SHARD, images - start), 0, "") for start in range(0, images, _PER_SHARD))
    return Manifest(
        format=0,
        name="",
        source_digest="",
        samples_per_shard=_PER_SHARD,
        images=images,
        annotations=0,
        categories=(),
        files=(),
        shards=shards,
    )


def _save(out: Path, name: str, records: np.ndarray) -> File:
    np.save(out / name, records)
    content = (out / name).read_bytes()
    return File(name, len(content), hashlib.sha256(content).hexdigest())
