"""Order images so that neighbours have similar shapes, and every contiguous slice pads little.

Images are padded to the largest height and the largest width of their slice. Sorting by one number does not keep both
alike: of slices of 4 of 64 images a quarter is padding after sorting by aspect ratio, a sixth after sorting by height.
Putting pairs together, pairs of pairs and so on leaves a tenth; simulated annealing finds 9%. In integers throughout,
so that it is the same on every machine.
"""

from typing import Any, cast

import numpy as np

from shards.arrays import Ints

# Pairing costs the square of the block size, and sorted images are alike in blocks of this many anyway.
_BLOCK = 64


def rough_keys(heights: Ints, widths: Ints) -> Ints:
    """Return keys [n] that sort portraits before landscapes, and each of them by the longer side."""
    return np.where(widths >= heights, widths, -heights)


def pair_up(heights: Ints, widths: Ints, batch_size: int) -> Ints:
    """Return the order, int64 [n], that puts images of similar shape together inside each batch of `batch_size`.

    The last batch may be shorter. Inside a batch, every 64 images in the given order are arranged by themselves, and
    the remaining ones too.
    """
    order = np.arange(len(heights))
    full = len(order) // batch_size * batch_size
    for start, end, size in ((0, full, batch_size), (full, len(order), len(order) - full)):
        batches = order[start:end].reshape(-1, max(size, 1))
        blocks_end = size // _BLOCK * _BLOCK
        for columns, length in ((slice(0, blocks_end), _BLOCK), (slice(blocks_end, size), size - blocks_end)):
            selected = batches[:, columns]
            if selected.size:
                blocks = selected.reshape(-1, length)
                paired = np.take_along_axis(blocks, _pair_up(heights[blocks], widths[blocks]), 1)
                batches[:, columns] = paired.reshape(selected.shape)
    return order


def _pair_up(heights: Ints, widths: Ints) -> Ints:
    """Return the order [m, n] of each row of sizes [m, n]: join groups of one, two, four and so on until one is left.

    The group with the longest side chooses first, because it is the hardest to pair, and takes the group with which it
    leaves the least padding. When their number is odd, the last group goes to the end.
    """
    blocks, count = heights.shape
    groups = np.tile(np.arange(count)[:, None], (blocks, 1, 1))  # [block, group, member]
    alone = np.empty((blocks, 0), np.int64)
    while (count := groups.shape[1]) > 1:
        first, second, last = _closest(heights, widths)
        if count % 2:
            alone = np.concatenate([_members(groups, last), alone], axis=1)
        groups = np.concatenate([_chosen(groups, first), _chosen(groups, second)], axis=2)
        heights = np.maximum(np.take_along_axis(heights, first, 1), np.take_along_axis(heights, second, 1))
        widths = np.maximum(np.take_along_axis(widths, first, 1), np.take_along_axis(widths, second, 1))
    return np.concatenate([groups[:, 0], alone], axis=1)


def _closest(heights: Ints, widths: Ints) -> tuple[Ints, Ints, Ints]:
    """Return the pairs of each row as first and second members [m, n // 2], and the remaining one if n is odd [m]."""
    blocks, count = heights.shape
    # The longest first; a stable sort, so that ties keep their order.
    by_side = np.argsort(-np.maximum(heights, widths), axis=1, kind="stable")
    # int32 takes half the time, and holds five canvases of the usual sizes.
    kind: Any = np.int32 if 5 * int(max(heights.max(), widths.max())) ** 2 < 2**31 else np.int64
    h = np.take_along_axis(heights, by_side, 1).astype(kind)
    w = np.take_along_axis(widths, by_side, 1).astype(kind)
    # The cost is two canvases less 1.2 times the candidate's pixels (times 2.5): found by trial, and not quite the
    # padding, so that large candidates are preferred.
    areas = 3 * h * w
    taken = np.iinfo(kind).max
    rows, left = np.arange(blocks), np.ones((blocks, count), np.bool_)
    first = np.empty((blocks, count // 2), np.int64)
    second = np.empty_like(first)
    for pair in range(count // 2):
        chosen = left.argmax(axis=1)
        left[rows, chosen] = False
        costs = np.maximum(h, h[rows, chosen][:, None])
        costs *= np.maximum(w, w[rows, chosen][:, None])
        costs *= 5
        costs -= areas
        costs[~left] = taken
        partner = costs.argmin(axis=1)
        left[rows, partner] = False
        first[:, pair], second[:, pair] = chosen, partner
    last = left.argmax(axis=1)
    return np.take_along_axis(by_side, first, 1), np.take_along_axis(by_side, second, 1), by_side[rows, last]


def _chosen(groups: Ints, which: Ints) -> Ints:
    return cast(Ints, np.take_along_axis(groups, which[:, :, None], 1))


def _members(groups: Ints, which: Ints) -> Ints:
    return groups[np.arange(len(groups)), which]
