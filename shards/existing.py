"""Is there a data set already, and is it the one that would be written?"""

import numpy as np

from shards import storage
from shards.defects import REPORT_NAME, DefectReport, Policy, parse_report
from shards.errors import ShardError
from shards.images import read_image
from shards.manifest import MANIFEST_NAME, Manifest, load_manifest
from shards.source import Source, file_sizes


def load_report(manifest: Manifest) -> DefectReport | None:
    """What was found in the source of a data set, and left out; None where the data set was not written here."""
    url = storage.join(manifest.url, REPORT_NAME)
    try:
        return parse_report(storage.read(url), url)
    except FileNotFoundError:
        return None


def existing_data_set(out: str) -> Manifest | None:
    """The data set at ``out``; None where the place is free. Raises ShardError where something else is there."""
    folder = storage.local_path(out)
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ShardError(f"{out}: is a file, expected a new or empty folder: choose another one")
    if storage.exists(storage.join(out, MANIFEST_NAME)):
        return load_manifest(out)
    if folder is not None and folder.exists() and any(folder.iterdir()):
        raise ShardError(f"{out}: is not empty and holds no data set, expected a new or empty folder")
    return None


def check_same(manifest: Manifest, source: Source, name: str, samples_per_shard: int, policy: Policy) -> None:
    """Raises ShardError unless ``manifest`` is what these would be written to."""
    found = (manifest.source_digest, manifest.samples_per_shard, manifest.name)
    report = load_report(manifest)
    if (
        found != (source.digest, samples_per_shard, name)
        or report is None
        or report.policy != policy
        or not _shards_present(manifest)
        or not _of_same_images(manifest, source)
    ):
        raise ShardError(
            f"{manifest.url}: already holds another data set ({manifest.name}, {manifest.images} images, digest "
            f"{manifest.digest[:12]}), expected a new or empty place: choose another one or delete it first"
        )


def _shards_present(manifest: Manifest) -> bool:
    present = storage.listing(manifest.url)
    return all(present.get(shard.name) == shard.bytes for shard in manifest.shards)


def _of_same_images(manifest: Manifest, source: Source) -> bool:
    """By the length of each file; those left out are few, so whether they still deserve it is worth a look."""
    index = manifest.index().images
    names = dict(zip(source.images.ids.tolist(), source.images.names, strict=True))
    sizes = file_sizes(source.folder, source.images.names)
    lengths = [sizes.get(names.get(image_id, "")) for image_id in index["image_id"].tolist()]
    if lengths != index["length"].tolist():
        return False
    absent = np.flatnonzero(~np.isin(source.images.ids, index["image_id"]))
    return not any(read_image(source.folder, source.image(int(row))).sound for row in absent)
