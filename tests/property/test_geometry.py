"""Equality of the geometry of many images at once and of single images."""

import hashlib

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from detr.config import TransformConfig
from detr.geometry import draw_geometry, eval_geometry, evaluated_sizes, output_sizes, upper_bits

sides = st.integers(1, 9000)
# Mostly the sizes of photographs, whose ratios are where the rounding matters.
sizes = st.one_of(st.tuples(sides, sides), st.tuples(st.sampled_from([640, 480, 427, 426, 500, 375, 333]), sides))
scales = st.lists(st.integers(1, 1200), min_size=1, max_size=12).map(tuple)
ranges = st.tuples(st.integers(1, 1500), st.integers(1, 1500)).map(lambda pair: (min(pair), max(pair)))
configs = st.one_of(
    st.just(TransformConfig()),
    st.builds(
        TransformConfig,
        train_scales=scales,
        crop_scales=scales,
        crop_range=ranges,
        max_size=st.integers(1, 2000),
        flip=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
        crop=st.booleans(),
    ),
)
image_ids = st.one_of(st.integers(0, 600_000), st.integers(-(2**63), 2**63 - 1))
images = st.lists(st.tuples(st.integers(0, 2**31), image_ids, sizes), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None)
@given(st.integers(-(2**65), 2**65), images, configs)
# One image that becomes 1334 pixels long, one more than `max_size`; two whose shorter side is rounded from a half.
@example(
    0,
    [(0, 0, (640, 200)), (0, 1, (640, 320)), (0, 2, (2 * 1333, 1))],
    TransformConfig(train_scales=(800,), flip=0.0, crop=False),
)
def test_sizes_of_many_images_equal_those_of_each_image(seed, images, config):
    epochs, ids, shapes = zip(*images, strict=True)
    widths, heights = np.array(shapes).T
    found = output_sizes(seed, np.array(epochs), np.array(ids), widths, heights, config)
    expected = [
        draw_geometry(seed, epoch, image_id, width, height, config).size for epoch, image_id, (width, height) in images
    ]
    assert list(zip(*(sides.tolist() for sides in found), strict=True)) == expected


@given(st.lists(sizes, min_size=1, max_size=40), st.integers(1, 1200), st.integers(1, 2000))
def test_evaluated_sizes_of_many_images_equal_those_of_each_image(shapes, shorter, longest):
    config = TransformConfig(eval_size=shorter, max_size=longest)
    found = evaluated_sizes(*np.array(shapes).T, config)
    expected = [eval_geometry(width, height, config).size for width, height in shapes]
    assert list(zip(*(sides.tolist() for sides in found), strict=True)) == expected


@given(st.integers(1, 2**32 - 1), st.data())
def test_random_number_is_scaled_to_its_range_exactly(count, data):
    # At the boundaries between one number of the range and the next.
    boundary = -(-data.draw(st.integers(0, count)) * 2**64 // count)
    drawn = min(max(boundary + data.draw(st.integers(-1, 1)), 0), 2**64 - 1)
    found = upper_bits(np.array([drawn], np.uint64), np.array([count], np.uint64))
    assert int(found[0]) == drawn * count >> 64


def test_thousand_draws_stay_the_same():
    """The expected digest is that of an independent implementation in Python's integers."""
    lines = []
    for number in range(1000):
        width, height = 1 + number * 7919 % 1500, 1 + number * 104729 % 1100
        geometry = draw_geometry(number % 7, number // 100, number * 1_000_003, width, height, TransformConfig())
        lines.append(str(geometry))
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == "2668e4fb2b3a74373c2e2cfe18353a1f129f5f93f14d27db2d71fb3510e66080"


def test_no_images_have_no_sizes():
    nothing = np.zeros(0, np.int64)
    assert [len(lengths) for lengths in output_sizes(0, nothing, nothing, nothing, nothing, TransformConfig())] == [
        0,
        0,
    ]
