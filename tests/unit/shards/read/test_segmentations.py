"""Segmentations from shards: equal to pycocotools' own, or reported in one line."""

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask
from pycocotools.coco import COCO

from shards.config import ReadConfig
from shards.errors import ShardError
from shards.masks.rle import decode_masks, encode_masks
from shards.read.bad_samples import BadSamples
from shards.read.loader import read_samples
from shards.read.segmentations import check_segmentations, true_runs

BOX = [[10, 10, 30.5, 10, 30.5, 25, 10, 25]]


def runs_of(pixels):
    """Return the uncompressed run lengths of a bool mask in column-major order."""
    flat = np.concatenate([[False], pixels.ravel(order="F"), [False]])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return {"size": list(pixels.shape), "counts": np.diff(changes, prepend=0, append=pixels.size).tolist()}


def read(manifest, image_id):
    (sample,) = read_samples(manifest, manifest.index().rows_of([image_id]), ReadConfig(0, masks=True))
    return sample


def expected(coco, image_id):
    """Return the masks of an image's non-crowd annotations as pycocotools makes them from the JSON."""
    reference = COCO(str(coco.annotations))
    return [
        reference.annToMask(annotation).astype(bool)
        for annotation in coco.data["annotations"]
        if annotation["image_id"] == image_id and not annotation["iscrowd"]
    ]


def entry(coco, number):
    return next(annotation for annotation in coco.data["annotations"] if annotation["id"] == number)


def test_masks_equal_those_of_pycocotools_in_the_order_of_boxes(coco):
    rng = np.random.default_rng(0)
    scattered = rng.random((34, 58)) < 0.5
    scattered[[0, 1, -2, -1], 0] = False  # the first run length is not 0, also after flipping
    entry(coco, 11)["segmentation"] = [*BOX, [1, 1, 9.5, 1, 5, 8.25], [0, 0, 1, 1]]  # the last has no area
    entry(coco, 18)["segmentation"] = runs_of(scattered)
    squeezed = mask.encode(np.asfortranarray(scattered[::-1].astype(np.uint8)))
    entry(coco, 19)["segmentation"] = {"size": [34, 58], "counts": squeezed["counts"].decode()}
    manifest = coco.write(samples_per_shard=3)
    for image in coco.data["images"]:
        sample = read(manifest, image["id"])
        truth = expected(coco, image["id"])
        assert sample.masks.shape == (len(sample.labels), image["height"], image["width"])
        assert sample.masks.dtype == bool
        assert np.array_equal(sample.masks, np.array(truth).reshape(sample.masks.shape))
    assert np.array_equal(read(manifest, 142).masks, [scattered, scattered[::-1]])
    assert read(manifest, 100).masks[0].sum() > 200


def test_masks_are_read_only_on_request(coco):
    manifest = coco.write()
    assert all(sample.masks is None for sample in read_samples(manifest, range(7)))


@pytest.mark.parametrize("ending", ["bmp", "gif", "jpg", "png", "tif", "webp"])
def test_segmentations_are_found_before_and_after_the_image(coco, ending):
    """Members are sorted by extension: `json` comes after `jpg` and before `webp`."""
    for number, image in enumerate(coco.data["images"]):
        with Image.open(coco.images / image["file_name"]) as picture:
            picture.convert("RGB").save(coco.images / f"other {number}.{ending}")
        image["file_name"] = f"other {number}.{ending}"
    for number, annotation in enumerate(coco.data["annotations"]):
        if not annotation["iscrowd"]:
            annotation["segmentation"] = [[number, number, number + 9, number, number + 9, number + 7]]
    manifest = coco.write(samples_per_shard=3)
    for image in coco.data["images"]:
        assert np.array_equal(
            read(manifest, image["id"]).masks,
            np.array(expected(coco, image["id"])).reshape(-1, image["height"], image["width"]),
        )


WRONG = {
    "absent": (None, "has no segmentation"),
    "empty": ([], "has no segmentation"),
    "of one line": ([[1, 1, 5, 5]], "has an ill-formed segmentation: no polygon of three points"),
    "of half a point": ([[1, 1, 5, 5, 9, 9, 3]], "half a point"),
    "far away": ([[1, 1, 5, 1, 1e9, 9]], "reaches 1e\\+09 pixels"),
    "words": ([["a", "b", 3, 4, 5, 6]], "neither polygons nor run lengths"),
    "runs too short": ({"size": [34, 58], "counts": [5, 5]}, "sum to 10 for a size of \\(34, 58\\), not to 34x58"),
    "runs of another size": ({"size": [58, 34], "counts": [34 * 58]}, "for a size of \\(58, 34\\)"),
    "runs that go back": ({"size": [34, 58], "counts": [34 * 58 + 5, -5]}, "run lengths"),
    "runs of thousands of digits": ({"size": [34, 58], "counts": "o" * 40_000 + "0"}, "not COCO's"),
    "squeezed and cut off": ({"size": [34, 58], "counts": "o"}, "cut off"),
    "squeezed and foreign": ({"size": [34, 58], "counts": "\u20ac"}, "not COCO's"),
}


@pytest.mark.parametrize(("segmentation", "message"), WRONG.values(), ids=WRONG)
def test_an_unusable_segmentation_names_image_and_annotation(coco, segmentation, message):
    entry(coco, 19)["segmentation"] = segmentation
    manifest = coco.write()
    with pytest.raises(ShardError, match=rf"image 142 in shard-000000.tar: annotation 19 .*{message}") as caught:
        read(manifest, 142)
    assert "\n" not in str(caught.value)
    with pytest.raises(ShardError, match="annotation 19"):
        check_segmentations(manifest)
    assert len(read(manifest, 100).masks) == 2


def test_an_image_with_a_bad_segmentation_counts_as_a_bad_sample(coco):
    entry(coco, 19)["segmentation"] = [[1, 2, 3]]
    manifest = coco.write()
    lenient = ReadConfig(0, masks=True, max_bad_samples=1)
    bad = BadSamples()
    assert 142 not in [sample.image_id for sample in read_samples(manifest, range(7), lenient, bad)]
    (line,) = bad.lines()
    assert line.startswith("image 142 in shard-000000.tar: annotation 19 has an ill-formed")
    check_segmentations(manifest, 1)


def test_a_data_set_without_segmentations_is_refused(coco):
    for annotation in coco.data["annotations"]:
        del annotation["segmentation"]
    with pytest.raises(ShardError, match="has no segmentation"):
        check_segmentations(coco.write(), 100)


def test_crowds_need_a_segmentation_only_for_scoring(coco):
    del entry(coco, 14)["segmentation"]
    manifest = coco.write()
    assert len(read(manifest, 100).masks) == 2
    with pytest.raises(ShardError, match=r"image 100 .* annotation 14 has no segmentation"):
        true_runs(manifest, np.arange(7))


def test_a_flipped_bit_in_segmentations_raises_one_line(coco):
    """The image is intact, so only the checksum of the segmentations shows the damage."""
    manifest = coco.write()
    record = manifest.index().images[manifest.index().rows_of([142])[0]]
    path = coco.root / "out" / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    content[record["text_offset"] + 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ShardError, match=r"image 142 in shard-000000.tar: its segmentations changed since they were written"
    ) as caught:
        read(manifest, 142)
    assert "\n" not in str(caught.value)


def test_a_shard_cut_off_after_an_image_raises_one_line(coco):
    manifest = coco.write()
    images = manifest.index().images
    record = images[np.argmax(images["text_offset"])]
    path = coco.root / "out" / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[: int(record["text_offset"]) + 5])
    with pytest.raises(ShardError, match=r"got 5 of .* the shard is truncated"):
        read(manifest, int(record["image_id"]))


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
def test_masks_of_any_memory_layout_survive_encoding(columns):
    masks = np.random.default_rng(1).random((4, 9, 13)) < 0.4
    masks[2] = False
    masks[3] = True
    given = np.ascontiguousarray(masks.transpose(0, 2, 1)).transpose(0, 2, 1) if columns else masks
    counts = encode_masks(given)
    assert all(isinstance(count, bytes) for count in counts)
    assert np.array_equal(decode_masks([{"size": [9, 13], "counts": count} for count in counts], 9, 13), masks)


def test_no_masks_give_no_run_lengths():
    assert encode_masks(np.zeros((0, 5, 6), bool)).shape == (0,)
    assert decode_masks([], 5, 6).shape == (0, 5, 6)
