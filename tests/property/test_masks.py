"""Properties of boxes and their filled masks under any geometry."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from detr.config import TransformConfig
from detr.geometry import draw_geometry
from detr.transforms import apply

CONFIG = TransformConfig(train_scales=(40, 96, 150), max_size=260, crop_scales=(50, 120), crop_range=(30, 90))


@st.composite
def filled_boxes(draw: st.DrawFn) -> tuple[tuple[int, int], list[int]]:
    """An image size (height, width) and a box [x1, y1, x2, y2] of whole pixels inside it."""
    height, width = draw(st.integers(20, 120)), draw(st.integers(20, 120))
    x1, y1 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return (height, width), [x1, y1, draw(st.integers(x1 + 1, width)), draw(st.integers(y1 + 1, height))]


@settings(max_examples=300, deadline=None)
@given(filled_boxes(), st.integers(0, 2**31))
def test_filled_box_and_its_mask_stay_equal(problem: tuple[tuple[int, int], list[int]], image_id: int) -> None:
    (height, width), (x1, y1, x2, y2) = problem
    mask = np.zeros((1, height, width), bool)
    mask[0, y1:y2, x1:x2] = True
    geometry = draw_geometry(0, 0, image_id, width, height, CONFIG)
    image, box = np.zeros((height, width, 3), np.uint8), np.array([[x1, y1, x2, y2]], np.float32)
    _, boxes, _, masks = apply(image, box, np.zeros(1, int), geometry, mask)
    assert len(masks) == len(boxes)
    if len(boxes) == 0:
        return
    centre, extent = boxes[0].numpy().reshape(2, 2) * geometry.size[::-1]
    low, high = centre - extent / 2, centre + extent / 2
    # Each nearest resize moves an edge by less than a pixel of what it makes; the last one scales what the first did.
    before = geometry.crop.size if geometry.crop else None
    tolerance = 1.001 + (np.array(geometry.size[::-1]) / before[::-1] if before else 0)
    rows, columns = np.nonzero(masks[0].numpy())
    if len(rows) == 0:
        assert (extent <= 2 * tolerance).any()
        return
    seen_low = np.array([columns.min(), rows.min()])
    seen_high = np.array([columns.max() + 1, rows.max() + 1])
    assert (np.abs(seen_low - low) <= tolerance).all()
    assert (np.abs(seen_high - high) <= tolerance).all()
