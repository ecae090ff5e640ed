"""Is there a data set already, and is it the one that would be written?"""

import numpy as np

from shards import storage
from shards.config import Policy
from shards.defects import REPORT_NAME, DefectReport, parse_report
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
    """Raises ShardError, saying what differs, unless ``manifest`` is what these would be written to."""
    if (manifest.source_digest, manifest.name) != (source.digest, name):
        made = "an annotation file of other content" if manifest.source_digest != source.digest else "the same file"
        raise ShardError(
            f"{manifest.url}: already holds another data set ({manifest.name}, {manifest.images} images, digest "
            f"{manifest.digest[:12]}, made of {made}; this one would be {name}), expected a new or empty place: choose "
            "another one or delete it first"
        )
    problem = (
        _other_options(manifest, samples_per_shard, policy) or _damage(manifest) or _other_images(manifest, source)
    )
    if problem:
        raise ShardError(f"{manifest.url}: already holds {name}, but {problem}")


def _other_options(manifest: Manifest, samples_per_shard: int, policy: Policy) -> str:
    report = load_report(manifest)
    if manifest.samples_per_shard != samples_per_shard:
        was, asked = f"--samples-per-shard {manifest.samples_per_shard}", str(samples_per_shard)
    elif report is not None and report.policy != policy:
        was, asked = f"--on-defect {report.policy}", policy
    else:
        return ""
    return f"written with {was}, not {asked}: choose another place, give the same, or delete it first"


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
    more = f" (and {len(bad) - 1} more of its files are not whole)" if len(bad) > 1 else ""
    return f"its {first} {state}{more}: copy it back, or delete the data set and run again"


def _other_images(manifest: Manifest, source: Source) -> str:
    """By the length of each file; those left out are few, so whether they still deserve it is worth a look."""
    index = manifest.index().images
    names = dict(zip(source.images.ids.tolist(), source.images.names, strict=True))
    sizes = file_sizes(source.folder, source.images.names)
    written = zip(index["image_id"].tolist(), index["length"].tolist(), strict=True)
    changed = [image_id for image_id, length in written if sizes.get(names.get(image_id, "")) != length]
    if not changed:
        absent = np.flatnonzero(~np.isin(source.images.ids, index["image_id"])).tolist()
        changed = [int(source.images.ids[row]) for row in absent if read_image(source.folder, source.image(row)).sound]
    if not changed:
        return ""
    number = "an image is" if len(changed) == 1 else f"{len(changed)} images are"
    return (
        f"{number} not as in {source.folder} now, such as image {changed[0]}: choose another place, or delete the data "
        "set and run again"
    )
