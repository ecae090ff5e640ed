"""Panoptic post-processing equals the original's steps, and panoptic quality COCO's, for any segments."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detr.panoptic import panoptic
from detr.variant import Outputs
from shards.panoptic.segments import TrueSegments
from shards.score.panoptic_folders import score_folders
from shards.score.panoptic_quality import ImageCounts, count, quality
from tests.support.panoptic_figures import plain_panoptic, write_panoptic_files

CATEGORIES = 5
THINGS = [True, False, True, False, True]
Prediction = tuple[np.ndarray, list[int]]
Problem = list[tuple[TrueSegments, Prediction]]


def patches(rng: np.random.Generator, height: int, width: int, count: int) -> np.ndarray:
    """Return an index per pixel, 0 to `count` - 1, all of them present, and -1 for the rest: rectangles over each other."""
    indices = np.full((height, width), -1)
    for index in range(count):
        y, x = rng.integers(0, height), rng.integers(0, width)
        indices[y : y + rng.integers(1, height + 1), x : x + rng.integers(1, width + 1)] = index
    for index in set(range(count)) - set(np.unique(indices).tolist()):
        indices[index // width, index % width] = index
    return np.unique(indices, return_inverse=True)[1].reshape(height, width) - int((indices < 0).any())


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Draw images with VOID, crowds, unlisted ids, areas that do not match, and predictions near the truth or anywhere."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    images = []
    for _ in range(draw(st.integers(1, 4))):
        height, width = rng.integers(6, 30, 2).tolist()
        places = patches(rng, height, width, int(rng.integers(1, 8)))
        segments = int(places.max()) + 1
        ids = rng.choice(2**24 - 1, segments, replace=False).astype(np.uint32) + 1
        labels = rng.integers(0, CATEGORIES, segments)
        areas = np.bincount(places[places >= 0], minlength=segments) * rng.choice([0.5, 1, 1, 2], segments)
        crowds = np.array(THINGS)[labels] & (rng.random(segments) < 0.3)
        listed = rng.random(segments) < 0.9
        pixels = np.append(ids, 0).astype(np.uint32)[places]
        truth = TrueSegments(pixels, ids[listed], labels[listed], np.ceil(areas[listed]), crowds[listed])
        if rng.random() < 0.7:
            found = np.roll(places, rng.integers(-2, 3, 2).tolist(), (0, 1))
            of_found = np.where(rng.random(segments) < 0.8, labels, rng.integers(0, CATEGORIES, segments))
        else:
            found = patches(rng, height, width, int(rng.integers(1, 8)))
            of_found = rng.integers(0, CATEGORIES, int(found.max()) + 1)
        images.append((truth, (found, of_found.tolist())))
    return images


def counted(problem: Problem) -> list[ImageCounts]:
    return [count(truth, *prediction) for truth, prediction in problem]


@settings(max_examples=60, deadline=None)
@given(problems())
def test_quality_is_cocos(problem: Problem) -> None:
    with TemporaryDirectory() as folder:
        expected = score_folders(*write_panoptic_files(Path(folder), problem, THINGS))
    found = quality(counted(problem), THINGS)
    for mine, its in zip(found.classes, expected.classes, strict=True):
        assert (mine.matched, mine.missed, mine.false) == (its.matched, its.missed, its.false)
        assert abs(mine.overlap - its.overlap) < 1e-9


@settings(max_examples=30, deadline=None)
@given(problems())
def test_truth_as_prediction_is_perfect(problem: Problem) -> None:
    counts = []
    for truth, (_, _) in problem:
        solid = ~truth.crowds & np.isin(truth.segment_ids, truth.ids)
        ids, labels = truth.segment_ids[solid], truth.labels[solid]
        indices = np.full(truth.ids.shape, -1)
        for index, segment in enumerate(ids):
            indices[truth.ids == segment] = index
        areas = np.array([(truth.ids == segment).sum() for segment in truth.segment_ids], np.float64)
        exact = TrueSegments(truth.ids, truth.segment_ids, truth.labels, areas, truth.crowds)
        counts.append(count(exact, indices, labels.tolist()))
    found = quality(counts, THINGS)
    assert all(
        group is None or (group.pq, group.sq, group.rq) == (1, 1, 1) for group in (found.all, found.things, found.stuff)
    )
    assert found.gains is not None
    assert set(vars(found.gains).values()) == {0.0}


@settings(max_examples=30, deadline=None)
@given(problems(), st.integers(0, 2**32))
def test_ids_order_and_ranks_change_no_bit(problem: Problem, seed: int) -> None:
    rng = np.random.default_rng(seed)
    other = []
    for truth, (indices, labels) in problem:
        names = rng.choice(2**24 - 1, len(truth.segment_ids), replace=False).astype(np.uint32) + 1
        ids = np.where(truth.ids == 0, 0, 2**24 + 1).astype(np.uint32)  # an unlisted id stays one
        for old, new in zip(truth.segment_ids, names, strict=True):
            ids[truth.ids == old] = new
        moved = rng.permutation(len(labels))
        renamed = np.append(np.argsort(moved), -1)[indices]
        renamed_truth = TrueSegments(ids, names, truth.labels, truth.areas, truth.crowds)
        other.append((renamed_truth, (renamed, [labels[place] for place in moved])))
    expected = quality(counted(problem), THINGS)
    assert quality(counted(other), THINGS) == expected
    ranks = int(rng.integers(1, 4))
    by_rank = [counted(problem[rank::ranks]) for rank in range(ranks)]
    assert quality([counts for rank in by_rank for counts in rank], THINGS) == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_segments_are_the_originals(seed: int) -> None:
    """Both merge stuff, drop small segments in several passes, and resize to larger, smaller and odd sizes."""
    rng = np.random.default_rng(seed)
    queries, classes = int(rng.integers(1, 12)), int(rng.integers(1, 5))
    grid, size, original = (tuple(rng.integers(low, high, 2).tolist()) for low, high in ((3, 9), (12, 40), (5, 60)))
    logits = torch.from_numpy(rng.normal(0, 1, (1, queries, classes + 1)).astype(np.float32))
    logits[0, np.arange(queries), rng.integers(0, classes + 1, queries)] += float(rng.choice([4, 8]))
    masks = torch.from_numpy(rng.normal(0, 3, (1, queries, *grid)).astype(np.float32))
    if queries > 2:
        masks[0, 2] = masks[0, 0]  # every pixel of it is a tie
    stuff = (rng.random(classes) < 0.6).tolist()
    found = panoptic(Outputs(logits, torch.zeros(1, queries, 4), masks=masks), [original], [size], None, stuff)[0]
    pixels, segments = plain_panoptic(logits[0], masks[0], size, original, stuff)
    assert [(segment.label, segment.area) for segment in found.segments] == segments
    assert torch.equal(found.indices.clamp(min=0).long(), pixels)
