"""The recipe for a few hundred images chooses its options by the data, and leaves those that the user gave."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from pipeline.config import RunConfig
from pipeline.data.small import fit_small
from pipeline.errors import RunConfigError
from pipeline.recipes import RECIPES, uses_built_in
from shards.dataset.index import ANNOTATION_DTYPE, IMAGE_DTYPE, Index
from shards.dataset.manifest import Manifest

SMALL = RECIPES["small"]


def data(images: int, objects: int, side: float = 100.0, size: tuple[int, int] = (640, 480)) -> Manifest:
    """Return a data set whose first image has `objects` objects of this side, and the others one each."""
    counts = [objects, *[1] * (images - 1)]
    rows = np.zeros(images, IMAGE_DTYPE)
    rows["width"], rows["height"] = size
    annotations = np.zeros(sum(counts) + 1, ANNOTATION_DTYPE)
    annotations["image"] = [*np.repeat(np.arange(images), counts), 0]
    annotations["bbox"][:, 2:] = side
    annotations["iscrowd"][-1] = 1  # a crowd is no object
    index = Index(rows, annotations)
    return cast(Manifest, SimpleNamespace(images=images, index=lambda: index))


def fit(train: Manifest, config: RunConfig = SMALL, given: tuple[str, ...] = ()) -> RunConfig:
    return fit_small(config, train, given).config


@pytest.mark.parametrize(("objects", "queries"), [(0, 20), (3, 20), (14, 30), (20, 30), (41, 70)])
def test_queries_are_half_as_many_again_as_objects_in_the_fullest_image(objects: int, queries: int) -> None:
    assert fit(data(50, objects)).model.num_queries == queries


def test_there_are_no_more_queries_than_the_smallest_image_has_cells() -> None:
    found = fit_small(SMALL, data(5, 900, size=(64, 64)))
    assert found.config.transform.train_scales == (56, 56, 64, 72)
    assert found.config.model.num_queries == 7 * 7 + 4 * 4 + 2 * 2
    assert "the smallest 69 cells" in found.reasons[2]


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [
        ((640, 480), 100.0, 192),
        ((640, 480), 15.0, 256),
        ((100, 100), 30.0, 96),
        ((200, 100), 3.0, 96),
        ((20, 20), 9.0, 64),
    ],
)
def test_sizes_suit_images_and_objects(size: tuple[int, int], side: float, expected: int) -> None:
    transform = fit(data(50, 3, side, size)).transform
    assert transform.eval_size == expected
    assert min(transform.train_scales) < expected < max(transform.train_scales) <= transform.max_size


def test_more_images_mean_fewer_epochs_of_more_steps() -> None:
    few, some, many = (fit(data(images, 3)) for images in (50, 200, 4000))
    assert [config.optim.epochs for config in (few, some, many)] == [71, 35, 12]
    assert [config.optim.batch_size for config in (few, some, many)] == [8, 8, 16]
    assert [config.optim.lr for config in (few, some, many)] == [7.1e-4, 7.1e-4, 1e-3]
    assert all(config.evaluate.every * 10 >= config.optim.epochs for config in (few, some, many))


def test_options_of_the_user_stay_and_the_others_follow_them() -> None:
    config = replace(
        SMALL,
        optim=replace(SMALL.optim, batch_size=4, epochs=30),
        transform=replace(SMALL.transform, eval_size=96),
        model=replace(SMALL.model, num_queries=17),
    )
    given = ("optim.batch_size", "optim.epochs", "transform.eval_size", "model.num_queries")
    found = fit_small(config, data(200, 12), given)
    assert (found.config.optim.batch_size, found.config.optim.epochs, found.config.model.num_queries) == (4, 30, 17)
    assert (found.config.optim.lr, found.config.optim.decay_epoch) == (5e-4, 10)
    assert found.config.transform.train_scales == (80, 88, 96, 104)
    assert not [line for line in found.reasons if "batch-size" in line or "epochs" in line.split(":")[0].split()]


def test_the_number_of_workers_which_may_change_chooses_nothing() -> None:
    optim, cluster = replace(SMALL.optim, batch_size=12), replace(SMALL.cluster, workers=12)
    config = replace(SMALL, optim=optim, cluster=cluster)
    with pytest.raises(RunConfigError, match=r"workers is 12 but .* is 8; .* add --optim\.batch-size 12 "):
        fit(data(200, 3), config)
    assert fit(data(200, 3), config, ("optim.batch_size",)).optim.batch_size == 12


def test_each_reason_begins_with_the_flags_that_it_stands_for() -> None:
    found = fit_small(SMALL, data(200, 12))
    flags = " ".join(line.split(":")[0] for line in found.reasons).split()
    values: dict[str, list[str]] = {}
    for word in flags:
        if word.startswith("--"):
            values[word[2:].replace("-", "_")] = []
        else:
            list(values.values())[-1].append(word)
    for name, words in values.items():
        section, option = name.split(".")
        got: Any = getattr(getattr(found.config, section), option)
        assert words == [str(value) for value in (got if isinstance(got, tuple) else (got,))]
    assert len(values) == 11


def test_a_model_that_is_given_keeps_its_queries() -> None:
    config = replace(SMALL, initial="models:/mine@best")
    assert fit(data(50, 41), config).model == SMALL.model
    assert not uses_built_in(config)
    assert uses_built_in(SMALL)
    assert not uses_built_in(RECIPES["detr-r50"])
