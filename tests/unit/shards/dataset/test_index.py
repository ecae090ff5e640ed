import hashlib
import io

import msgspec
import numpy as np
import pytest

from shards.dataset.manifest import ANNOTATIONS_NAME, IMAGES_NAME, load_index, load_manifest
from shards.dataset.verify import verify
from shards.errors import ShardError


def rewrite(folder, name, change):
    """Change the records of a file and its digest in the manifest, as a faulty writer would."""
    records = np.load(folder / name)
    change(records)
    buffer = io.BytesIO()
    np.save(buffer, records)
    content = buffer.getvalue()
    (folder / name).write_bytes(content)
    manifest = msgspec.json.decode((folder / "manifest.json").read_bytes())
    for file in manifest["files"]:
        if file["name"] == name:
            file["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_bytes(msgspec.json.encode(manifest))


def put(field, value, row=0):
    def change(records):
        records[field][row] = value

    return change


def swap(*fields):
    """Swap rows 2 and 3, the last and the first of their shards."""

    def change(records):
        for field in fields:
            records[field][[2, 3]] = records[field][[3, 2]]

    return change


def shift(records):
    records["first"] += 1


IMAGES = [
    (put("shard", 99), "row 0 is in shard 99, expected 0"),
    (put("shard", -1), "row 0 is in shard -1, expected 0"),
    (put("shard", 1, 2), "row 2 is in shard 1, expected 0"),
    (swap("shard"), "row 2 is in shard 1, expected 0"),
    (put("offset", -5), r"row 0 has \d+ bytes at -5 of a shard of"),
    (put("offset", 1 << 62, 4), r"row 4 has \d+ bytes at 4611686018427387904 of a shard of"),
    (put("length", 1 << 62), r"row 0 has 4611686018427387904 bytes at \d+ of a shard of"),
    (put("length", (1 << 63) - 1), r"row 0 has 9223372036854775807 bytes"),
    (put("length", -1), "row 0 has -1 bytes"),
    (put("text_offset", -1), "row 0 has [0-9]+ bytes at -1 of a shard"),
    (put("text_length", -1), "row 0 has -1 bytes"),
    (put("text_length", 2**31 - 1), "row 0 has 2147483647 bytes"),
    (put("width", 0), r"row 0 is 0 x \d+ pixels"),
    (put("height", -3), r"row 0 is \d+ x -3 pixels"),
    (put("image_id", 107, [0, 5]), "image ids are not distinct"),
    (put("first", 10**9), r"row 0 has \d+ annotations from 1000000000 on"),
    (shift, r"row 0 has \d+ annotations from 1 on"),
    (put("count", -1), "row 0 has -1 annotations"),
    (put("count", 99, 6), r"the images have 10\d annotations, but there are 9"),
]
ANNOTATIONS = [
    (put("image", 1), "annotation 0 is of row 1, but lies among those of another"),
    (put("image", -1), "annotation 0 is of row -1"),
    (put("label", 3), r"annotation 0 has label 3, expected 0\.\.2"),
    (put("label", -1), "annotation 0 has label -1"),
]
CASES = [(IMAGES_NAME, *case) for case in IMAGES] + [(ANNOTATIONS_NAME, *case) for case in ANNOTATIONS]


@pytest.mark.parametrize(("name", "change", "message"), CASES)
def test_an_index_that_contradicts_the_manifest_raises_one_line(coco, name, change, message):
    coco.write(samples_per_shard=3)
    rewrite(coco.root / "out", name, change)
    with pytest.raises(ShardError, match=f"contradicts the manifest: {message}") as caught:
        load_index(load_manifest(coco.root / "out"))
    assert "\n" not in str(caught.value)
    assert verify(coco.root / "out").problems == (str(caught.value),)
