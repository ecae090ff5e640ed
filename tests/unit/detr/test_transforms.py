from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from detr.config import TransformConfig
from detr.geometry import Crop, Geometry, crop_before_resize, draw_geometry, eval_geometry, resized_size
from detr.transforms import apply

NO_BOXES, NO_LABELS = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)


def photo(height: int, width: int) -> np.ndarray:
    """Return smooth structure with noise, so that interpolation errors show."""
    y, x = np.mgrid[:height, :width]
    waves = 127 + 80 * np.sin(x / 7.3 + y / 11.1)[..., None] * np.array([1.0, 0.8, 0.6])
    noise = np.random.default_rng(0).integers(-40, 40, (height, width, 3))
    return (waves + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("width", "height", "shorter", "longest", "expected"),
    [
        (640, 480, 800, 1333, (800, 1066)),
        (480, 640, 800, 1333, (1066, 800)),
        (640, 426, 800, 1333, (800, 1201)),
        (640, 383, 800, 1333, (798, 1333)),
        (640, 360, 800, 1333, (750, 1333)),
        (640, 200, 800, 1333, (417, 1334)),
        (200, 640, 800, 1333, (1334, 417)),
        (640, 201, 800, 1333, (419, 1334)),
        (200, 479, 800, 1333, (1334, 557)),
        (612, 612, 800, 1333, (800, 800)),
        (640, 480, 480, 1333, (480, 640)),
        (333, 500, 600, None, (900, 600)),
        (500, 375, 400, None, (400, 533)),
        (9000, 1, 800, 1333, (1, 9000)),
    ],
)
def test_resized_sizes_equal_the_originals(
    width: int, height: int, shorter: int, longest: int | None, expected: tuple[int, int]
) -> None:
    assert resized_size(width, height, shorter, longest) == expected


@pytest.mark.parametrize("size", [(150, 200), (87, 61), (430, 571), (480, 321)])
def test_resizing_stays_within_two_levels_of_pil(size: tuple[int, int]) -> None:
    image = photo(240, 320)
    pixels, _, _ = apply(image, NO_BOXES, NO_LABELS, Geometry(False, None, size))
    pil = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR), np.int16)
    assert np.abs(pixels.permute(1, 2, 0).numpy().astype(np.int16) - pil).max() <= 2


def test_flip_crop_and_resize_are_the_originals_steps_in_order() -> None:
    image = photo(60, 80)
    boxes = np.array([[8, 6, 24, 30], [70, 50, 80, 60]], np.float32)
    geometry = Geometry(True, Crop((90, 120), top=10, left=30, size=(50, 80)), (100, 160))
    pixels, got, labels = apply(image, boxes, np.array([3, 5]), geometry)

    pil = Image.fromarray(image).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pil = pil.resize((120, 90), Image.Resampling.BILINEAR).crop((30, 10, 110, 60))
    pil = pil.resize((160, 100), Image.Resampling.BILINEAR)
    assert np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - np.asarray(pil).astype(int)).max() <= 3
    # Flipped [56, 6, 72, 30], at 1.5x [84, 9, 108, 45], in the crop [54, -1 -> 0, 78, 35] of 80 x 50.
    expected = [[(54 + 78) / 2 / 80, 35 / 2 / 50, 24 / 80, 35 / 50]]
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6)
    assert labels.tolist() == [3]


def test_boxes_follow_their_pixels() -> None:
    image = np.zeros((96, 128, 3), np.uint8)
    image[32:64, 16:48] = 255
    config = TransformConfig(train_scales=(192,), max_size=400, crop_scales=(160,), crop_range=(120, 160))
    for image_id in range(40):
        geometry = draw_geometry(0, 0, image_id, 128, 96, config)
        pixels, boxes, _ = apply(image, np.array([[16, 32, 48, 64]], np.float32), np.array([0]), geometry)
        assert pixels.shape[1:] == geometry.size
        rows, columns = np.nonzero(pixels[0].numpy() > 127)
        if len(boxes) == 0:
            assert len(rows) == 0
            continue
        cx, cy, w, h = boxes[0].numpy() * np.array(geometry.size[::-1] * 2)
        seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], seen, atol=1.5)


def test_boxes_are_clamped_and_those_without_area_dropped() -> None:
    boxes = np.array([[-5, -5, 10, 10], [4, 4, 4, 9], [20, 2, 30, 8], [3, 9, 8, 3], [0, 0, 20, 10]], np.float32)
    _, got, labels = apply(photo(10, 20), boxes, np.arange(5), Geometry(False, None, (10, 20)))
    assert labels.tolist() == [0, 4]
    np.testing.assert_allclose(got.numpy(), [[0.25, 0.5, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0]])


def test_flat_boxes_stay_unless_the_image_is_cropped() -> None:
    image, labels = np.zeros((20, 30, 3), np.uint8), np.array([3, 4])
    boxes = np.array([[29, 18, 29, 18], [2, 3, 9, 8]], np.float32)  # of a segment of one pixel, and of a large one
    crop = Crop((20, 30), 0, 0, (20, 30))
    for cropped, given, kept in ((None, True, [3, 4]), (crop, True, [4]), (None, False, [4])):
        *_, found = apply(image, boxes, labels, Geometry(False, cropped, (20, 30)), flat_boxes=given)
        assert found.tolist() == kept
    _, cxcywh, _ = apply(image, boxes, labels, Geometry(True, None, (20, 30)), flat_boxes=True)
    assert cxcywh[0].tolist() == pytest.approx(
        [1 / 30, 18 / 20, 0, 0], abs=1e-6
    )  # where 30 - 29 is, as in the original


def test_read_only_image_is_not_written_to() -> None:
    image = photo(20, 30)
    image.setflags(write=False)
    for flip in (False, True):
        pixels, _, _ = apply(image, NO_BOXES, NO_LABELS, Geometry(flip, None, (20, 30)))
        pixels.zero_()
    assert image.any()


def chained(masks: np.ndarray, geometry: Geometry) -> torch.Tensor:
    """Return the masks after the original's steps."""

    def resize(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return F.interpolate(x[:, None].float(), size, mode="nearest")[:, 0] > 0.5

    x = torch.from_numpy(masks.copy())
    x = x.flip(-1) if geometry.flip else x
    if (crop := geometry.crop) is not None:
        x = resize(x, crop.resized)[:, crop.top : crop.top + crop.size[0], crop.left : crop.left + crop.size[1]]
    return resize(x, geometry.size)


def test_masks_equal_the_originals_steps() -> None:
    masks = np.random.default_rng(0).random((3, 97, 141)) > 0.5
    masks.setflags(write=False)
    boxes, labels = np.array([[0, 0, 141, 97]] * 3, np.float32), np.arange(3)
    config = TransformConfig(train_scales=(64, 117, 211), max_size=400, crop_scales=(90, 160), crop_range=(60, 120))
    for image_id in range(40):
        geometry = draw_geometry(0, 0, image_id, 141, 97, config)
        *_, got = apply(photo(97, 141), boxes, labels, geometry, masks)
        assert got.dtype == torch.bool
        assert torch.equal(got, chained(masks, geometry))


def test_nearest_pixel_is_rounded_as_in_the_original() -> None:
    """At these sizes double precision would choose another pixel than the original's float32."""
    masks = np.indices((6, 8)).sum(0)[None] % 2 > 0
    *_, got = apply(photo(6, 8), np.array([[0, 0, 8, 6]]), np.zeros(1), Geometry(False, None, (74, 82)), masks)
    assert torch.equal(got, chained(masks, Geometry(False, None, (74, 82))))


def test_masks_are_dropped_with_their_boxes() -> None:
    boxes = np.array([[4, 4, 4, 9], [0, 0, 20, 10], [30, 20, 40, 30], [10, 10, 30, 25]], np.float32)
    masks = np.zeros((4, 30, 40), bool)
    masks[np.arange(4), [5, 6, 21, 20], [4, 7, 31, 12]] = True
    geometry = Geometry(False, Crop((30, 40), top=0, left=0, size=(22, 20)), (22, 20))
    _, got, labels, kept = apply(photo(30, 40), boxes, np.arange(4), geometry, masks)
    assert labels.tolist() == [1, 3]
    assert len(got) == 2
    assert kept.nonzero().tolist() == [[0, 6, 7], [1, 20, 12]]


def test_no_objects_have_no_masks() -> None:
    *_, masks = apply(photo(30, 40), NO_BOXES, NO_LABELS, Geometry(True, None, (60, 80)), np.zeros((0, 30, 40), bool))
    assert masks.shape == (0, 60, 80)


def test_geometry_depends_only_on_seed_epoch_and_image() -> None:
    config = TransformConfig()
    drawn = [draw_geometry(seed, epoch, 7, 640, 480, config) for seed in range(5) for epoch in range(20)]
    assert drawn == [draw_geometry(seed, epoch, 7, 640, 480, config) for seed in range(5) for epoch in range(20)]
    assert len(set(drawn)) > 60
    # A fixed value, because a change of the hash would silently change every run.
    assert draw_geometry(42, 3, 139, 640, 426, config) == Geometry(
        False, Crop((400, 600), top=4, left=16, size=(394, 535)), (608, 825)
    )


def test_augmentation_has_the_papers_probabilities() -> None:
    config = TransformConfig()
    drawn = [draw_geometry(1, 0, image_id, 640, 480, config) for image_id in range(4000)]
    assert abs(sum(geometry.flip for geometry in drawn) / 4000 - 0.5) < 0.03
    crops = [geometry.crop for geometry in drawn if geometry.crop is not None]
    assert abs(len(crops) / 4000 - 0.5) < 0.03
    scales = Counter(min(geometry.size) for geometry in drawn if geometry.crop is None)
    assert set(scales) == set(config.train_scales)
    assert min(scales.values()) > 120
    assert Counter(min(crop.resized) for crop in crops).keys() == {400, 500, 600}
    for crop in crops:
        assert 384 <= crop.size[0] <= 600
        assert 384 <= crop.size[1] <= 600
        assert 0 <= crop.top <= crop.resized[0] - crop.size[0]
        assert 0 <= crop.left <= crop.resized[1] - crop.size[1]


def test_without_augmentation_all_epochs_are_equal() -> None:
    config = TransformConfig(train_scales=(96,), flip=0.0, crop=False)
    drawn = {draw_geometry(seed, epoch, 5, 128, 96, config) for seed in range(3) for epoch in range(3)}
    assert drawn == {Geometry(False, None, (96, 128))}


def test_evaluation_only_resizes() -> None:
    assert eval_geometry(640, 200, TransformConfig()) == Geometry(False, None, (417, 1334))


def test_cropping_first_keeps_output_size_and_box_content() -> None:
    """The box of a bright square stays at its pixels, although the crop's edges are rounded."""
    image = np.zeros((426, 640, 3), np.uint8)
    image[100:300, 200:450] = 255
    config, crops = TransformConfig(pixels="fast"), 0
    for image_id in range(60):
        drawn = draw_geometry(0, 0, image_id, 640, 426, config)
        geometry = crop_before_resize(drawn, 640, 426)
        assert geometry.size == drawn.size
        if drawn.crop is None:
            assert geometry == drawn
            continue
        crops += 1
        pixels, boxes, _ = apply(image, np.array([[200, 100, 450, 300]], np.float32), np.array([0]), geometry)
        theirs, expected, _ = apply(image, np.array([[200, 100, 450, 300]], np.float32), np.array([0]), drawn)
        assert pixels.shape == theirs.shape
        np.testing.assert_allclose(boxes.numpy(), expected.numpy(), atol=1 / 384)
        rows, columns = np.nonzero(pixels[0].numpy() > 127)
        cx, cy, w, h = boxes[0].numpy() * np.array(geometry.size[::-1] * 2)
        seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], seen, atol=0.51)
    assert crops > 15


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 900), (640, 480), (20, 17)])
def test_cropping_first_stays_inside_the_image(width: int, height: int) -> None:
    for image_id in range(200):
        geometry = crop_before_resize(draw_geometry(0, 0, image_id, width, height, TransformConfig()), width, height)
        if (crop := geometry.crop) is not None:
            assert crop.resized == (height, width)
            assert 0 <= crop.top < crop.top + crop.size[0] <= height
            assert 0 <= crop.left < crop.left + crop.size[1] <= width
