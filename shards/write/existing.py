"""Check for an existing data set, and compare it with the one that would be written."""

import numpy as np

from shards.arrays import Records
from shards.config import Policy
from shards.dataset.manifest import MANIFEST_NAME, Manifest, load_manifest
from shards.errors import ShardError
from shards.source.coco import SegmentFolder, Source
from shards.source.folder import file_sizes
from shards.source.images import read_image
from shards.source.report import REPORT_NAME, load_report
from shards.source.segments import read_segment_file
from shards.store import storage


def existing_data_set(out: str) -> Manifest | None:
    """Return the data set at `out`, or None when nothing is there; raise `ShardError` when something else is."""
    folder = storage.local_path(out)
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ShardError(f"{out}: is a file, expected a new or empty folder: choose another one")
    if storage.exists(storage.join(out, MANIFEST_NAME)):
        return load_manifest(out)
    if folder is not None and folder.exists() and any(folder.iterdir()):
        raise ShardError(f"{out}: is not empty and holds no data set, expected a new or empty folder")
    return None


def check_same(manifest: Manifest, source: Source, name: str, samples_per_shard: int, policy: Policy) -> None:
    """Raise `ShardError` with the difference unless `manifest` is what this source and options would be written as."""
    if (manifest.source_digest, manifest.name) != (source.digest, name):
        origin = "an annotation file of other content" if manifest.source_digest != source.digest else "the same file"
        raise ShardError(
            f"{manifest.url}: already holds another data set ({manifest.name}, {manifest.images} images, digest "
            f"{manifest.digest[:12]}, made of {origin}; this one would be {name}), expected a new or empty folder: "
            "choose another one or delete it first"
        )
    problem = (
        _other_options(manifest, samples_per_shard, policy) or _damage(manifest) or _other_images(manifest, source)
    )
    if problem:
        raise ShardError(f"{manifest.url}: already holds {name}, but {problem}")


def _other_options(manifest: Manifest, samples_per_shard: int, policy: Policy) -> str:
    report = load_report(manifest)
    if manifest.samples_per_shard != samples_per_shard:
        written, wanted = f"--samples-per-shard {manifest.samples_per_shard}", str(samples_per_shard)
    elif report is not None and report.policy != policy:
        written, wanted = f"--on-defect {report.policy}", policy
    else:
        return ""
    return f"written with {written}, not {wanted}: choose another folder, give the same, or delete it first"


def _damage(manifest: Manifest) -> str:
    present = storage.listing(manifest.url)
    expected = {shard.name: shard.bytes for shard in manifest.shards}
    bad = [name for name, length in expected.items() if present.get(name) != length]
    if REPORT_NAME not in present:
        bad.append(REPORT_NAME)
    if not bad:
        return ""
    first = bad[0]
    state = f"has {present[first]} bytes, not {expected[first]}" if first in present else "is missing"
    more = f" (and {len(bad) - 1} more of its files are missing or incomplete)" if len(bad) > 1 else ""
    return f"its {first} {state}{more}: copy it back, or delete the data set and run again"


def _other_images(manifest: Manifest, source: Source) -> str:
    """Compare the length of each image file; decode the few that were left out, as they may be sound now."""
    index = manifest.index().images
    names = dict(zip(source.images.ids.tolist(), source.images.names, strict=True))
    sizes = file_sizes(source.folder, source.images.names)
    written = zip(index["image_id"].tolist(), index["length"].tolist(), strict=True)
    changed = [image_id for image_id, length in written if sizes.get(names.get(image_id, "")) != length]
    folder = source.folder
    if source.segments is not None and not changed:
        changed, folder = _other_pngs(index, source, source.segments), source.segments.folder
    if not changed:
        folder = source.folder
        left_out = np.flatnonzero(~np.isin(source.images.ids, index["image_id"])).tolist()
        changed = [int(source.images.ids[row]) for row in left_out if _is_sound(source, row)]
    if not changed:
        return ""
    number = "an image is" if len(changed) == 1 else f"{len(changed)} images are"
    return (
        f"{number} not as in {folder} now, such as image {changed[0]}: choose another folder, or delete "
        "the data set and run again"
    )


def _other_pngs(index: Records, source: Source, segments: SegmentFolder) -> list[int]:
    """Return the ids of images with a PNG of another length than the written one, in a panoptic source."""
    names = dict(zip(source.images.ids.tolist(), segments.names, strict=True))
    sizes = file_sizes(segments.folder, segments.names)
    written = zip(index["image_id"].tolist(), index["text_length"].tolist(), strict=True)
    return [image_id for image_id, length in written if sizes.get(names.get(image_id, "")) != length]


def _is_sound(source: Source, row: int) -> bool:
    """Return True if an image, and its PNG in a panoptic source, can be used."""
    image, png = source.image(row), source.segments
    return read_image(source.folder, image).sound and (
        png is None or read_segment_file(png.folder, png.names[row], image, ()).sound
    )
