import numpy as np
import pytest

from shards.panoptic.segments import find_regions, segment_masks


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 1), (23, 31)])
def test_regions_have_the_areas_and_corners_of_their_pixels(shape: tuple[int, int]) -> None:
    ids = np.random.default_rng(shape).choice(np.array([0, 3, 70000, 2**24 - 1], np.uint32), shape)
    regions = find_regions(ids)
    assert regions.ids.tolist() == sorted(set(ids.ravel().tolist()))
    for number, area, corners in zip(regions.ids, regions.areas, regions.corners, strict=True):
        rows, columns = np.nonzero(ids == number)
        assert area == len(rows)
        assert corners.tolist() == [columns.min(), rows.min(), columns.max(), rows.max()]


def test_masks_are_in_the_order_of_the_ids() -> None:
    ids = np.array([[0, 5], [9, 5]], np.uint32)
    masks = segment_masks(ids, np.array([9, 5], np.uint32))
    assert masks.tolist() == [[[False, False], [True, False]], [[False, True], [False, True]]]
