"""Properties of the order by shape: every image stays in its step, and similar images are put together."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detr.config import TransformConfig
from detr.geometry import output_sizes
from shards.plan.shape_order import pair_up

sides = st.integers(1, 2000)
shapes = st.lists(st.tuples(sides, sides), max_size=300)


@settings(deadline=None)
@given(shapes, st.integers(1, 200))
def test_every_image_stays_in_its_step(found, batch_size):
    heights, widths = np.array(found, np.int64).reshape(-1, 2).T
    order = pair_up(heights, widths, batch_size)
    for start in range(0, len(order), batch_size):
        step = order[start : start + batch_size]
        assert sorted(step.tolist()) == list(range(start, start + len(step)))


@settings(deadline=None)
@given(shapes, st.integers(1, 64))
def test_step_is_arranged_independently_of_other_steps(found, batch_size):
    heights, widths = np.array(found, np.int64).reshape(-1, 2).T
    order = pair_up(heights, widths, batch_size)
    for start in range(0, len(order), batch_size):
        step = slice(start, start + batch_size)
        assert (pair_up(heights[step], widths[step], batch_size) + start).tolist() == order[step].tolist()


@given(
    st.lists(st.tuples(sides, sides), min_size=16, max_size=16, unique=True),
    st.permutations(range(64)),
    st.sampled_from([1, 30]),
)
def test_images_that_come_in_fours_are_put_together(found, order_given, scale):
    # Sides of 60,000 pixels need wider integers than those of images do.
    heights, widths = scale * np.repeat(np.array(found), 4, axis=0)[np.array(order_given)].T
    order = pair_up(heights, widths, 64)
    for member in np.stack([heights, widths])[:, order].reshape(2, 16, 4):
        assert (member == member[:, :1]).all()


# The most common sizes of COCO's train2017, each with its share of 20.
SIZES = [(640, 480)] * 6 + [(640, 427)] * 5 + [(480, 640)] * 3 + [(640, 426)] * 2 + [(500, 375)] * 2 + [(427, 640)] * 2


@pytest.mark.parametrize(("arranged", "least", "most"), [(False, 0.25, 0.40), (True, 0.0, 0.10)])
def test_a_tenth_of_the_pixels_is_padding_at_4_of_64_images(arranged, least, most):
    ids = np.arange(64 * 200)
    widths, heights = np.array([SIZES[number * 7919 % 20] for number in ids]).T
    heights, widths = output_sizes(42, np.zeros_like(ids), ids, widths, heights, TransformConfig())
    order = pair_up(heights, widths, 64) if arranged else ids
    h, w = heights[order].reshape(-1, 4), widths[order].reshape(-1, 4)
    share = 1 - (h * w).sum() / (4 * h.max(1) * w.max(1)).sum()
    assert least < share <= most
