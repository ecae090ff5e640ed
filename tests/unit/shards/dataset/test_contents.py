"""Contents of data sets, and differences that are more than chance."""

from collections.abc import Sequence

import numpy as np
import pytest

from shards.dataset.contents import contents, differences, missing_classes, warning_lines
from shards.dataset.manifest import Manifest
from tests.support.labelled import labelled

Objects = list[tuple[int, float, float, float, float]]


def scene(rng: np.random.Generator, shares: Sequence[float], side: float = 40.0) -> Objects:
    """Return the objects of an image of one main class, as a herd: not independent of each other."""
    count, main = int(rng.geometric(0.2)), int(rng.choice(len(shares), p=shares))
    labels = np.where(rng.random(count) < 0.8, main, rng.choice(len(shares), count, p=shares))
    sides = side * rng.lognormal(0, 0.3) * rng.lognormal(0, 0.2, count)
    return [(int(label), 0.0, 0.0, size, size) for label, size in zip(labels, sides, strict=True)]


def scenes(rng: np.random.Generator, images: int, shares: Sequence[float], side: float = 40.0) -> Manifest:
    return labelled([scene(rng, shares, side) for _ in range(images)], len(shares))


def test_contents_count_images_sizes_and_classes_without_crowds() -> None:
    manifest = labelled([[(0, 0, 0, 10, 10), (2, 0, 0, 50, 50), (2, 0, 0, 400, 400)], [], [(0, 0, 0, 96, 96)]])
    manifest.index().annotations["iscrowd"][1] = 1
    found = contents(manifest)
    assert (found.images, found.annotations) == (3, 3)
    counted = dict(zip(found.objects.names, found.objects.counts.tolist(), strict=True))
    assert {name: count for name, count in counted.items() if count} == {"0": 1, "1": 1, "2": 1}
    sizes = dict(zip(found.sizes.names, found.sizes.counts.tolist(), strict=True))
    assert {name: count for name, count in sizes.items() if count} == {"under 16": 1, "96-192": 1, "384+": 1}
    assert found.classes.counts.tolist() == [2, 0, 1]
    assert found.classes.images.tolist() == [2, 0, 1]
    assert found.classes.shares.tolist() == pytest.approx([2 / 3, 0, 1 / 3])


def test_samples_of_one_population_hardly_ever_differ() -> None:
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.full(12, 0.5))
    large, wrong = scenes(rng, 600, shares), 0
    of_large = contents(large)
    expected, found = [], []
    for images in (20, 60, 200) * 25:
        of_small = contents(scenes(rng, images, shares))
        wrong += any(difference.differs for difference in differences(of_large, of_small))
        classes = differences(of_large, of_small)[2]
        expected.append(classes.by_chance)
        found.append(classes.distance)
    assert wrong <= 1
    # Objects of an image are alike, so chance is greater than for independent objects, and the estimate knows it.
    assert np.mean(found) == pytest.approx(np.mean(expected), rel=0.2)


@pytest.mark.parametrize(
    ("shares", "side", "kind"), [((0.1, 0.2, 0.7), 40.0, "classes"), ((0.5, 0.3, 0.2), 90.0, "sizes")]
)
def test_other_classes_and_other_sizes_are_found(shares: tuple[float, ...], side: float, kind: str) -> None:
    rng = np.random.default_rng(1)
    of_train = contents(scenes(rng, 400, (0.5, 0.3, 0.2)))
    of_val = contents(scenes(rng, 200, shares, side))
    assert [difference.kind for difference in differences(of_train, of_val) if difference.differs] == [kind]
    (line,) = warning_lines(of_train, of_val)
    assert line.startswith(f"training and validation data differ in the {kind} of objects: ")
    assert "expected" in line


def test_a_class_of_one_data_set_only_is_named_unless_chance_explains_it() -> None:
    image: Objects = [(0, 0, 0, 50, 50), (1, 0, 0, 50, 50)]
    frequent = contents(labelled([image] * 100))
    without = contents(labelled([image[:1]] * 100))
    assert missing_classes(without, frequent) == ("class 1",)
    assert any(
        line.startswith("the class class 1 is only in the training data") for line in warning_lines(frequent, without)
    )
    # What cannot be learned is a mistake however rare it is.
    rare = contents(labelled([image[:1]] * 99 + [image]))
    assert missing_classes(without, rare) == ()
    assert warning_lines(rare, without) == ()
    assert warning_lines(without, rare) == (
        "the class class 1 is only in the validation data; expected objects to learn them from",
    )


def test_a_data_set_does_not_differ_from_itself_or_from_nothing() -> None:
    found, empty = contents(labelled([[(0, 0, 0, 50, 50)]] * 3)), contents(labelled([[], []]))
    assert [difference.distance for difference in differences(found, found)] == [0, 0, 0]
    assert [difference.distance for difference in differences(found, empty)[1:]] == [0, 0]
    assert warning_lines(found, found) == ()
