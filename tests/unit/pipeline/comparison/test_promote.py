"""Promotion of a version: an alias moves only if the interval excludes a loss."""

from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.comparison import promote as module
from pipeline.comparison.compare import Comparison
from pipeline.comparison.promote import promote, refuse_loss
from pipeline.errors import PipelineError
from shards.score.difference import Change
from tests.support.scored_versions import Registry, grid_data, missing, perfect


@pytest.fixture
def held(registry: Registry) -> str:
    """Return a version that misses some objects and has the alias."""
    uri = registry.version("m", missing(perfect(registry.data), 0.3))
    promote(uri, "production")
    return uri


def test_the_first_version_of_an_alias_has_nothing_to_lose_against(registry: Registry) -> None:
    uri = registry.version("m", None)
    found = promote(uri, "production")
    assert (found.moved, found.against, found.comparison) == (True, "", None)
    assert registry.holder("m") == "1"
    assert registry.tags(uri)["against"] == "nothing: no version had the alias"


def test_a_better_version_is_promoted_and_says_why(registry: Registry, held: str, monkeypatch) -> None:
    monkeypatch.setenv("USER", "ada")
    uri = registry.version("m", perfect(registry.data))
    found = promote(uri, "production")
    assert (found.moved, found.against, registry.holder("m")) == (True, held, "2")
    assert found.comparison is not None
    change, tags = found.comparison.difference.deciding, registry.tags(uri)
    assert tags["against"] == held
    assert tags["AP"] == f"{change.before:.6f} to {change.after:.6f}, change {change.difference:+.6f}"
    assert tags["interval"].startswith(f"{change.low:+.6f} to {change.high:+.6f} (95%")
    assert tags["data"] == f"labelled, 120 images, digest {registry.data.digest}"
    assert tags["by"] == "ada"
    assert tags["at"].endswith("UTC")
    assert "forced" not in tags


def test_a_worse_version_is_refused(registry: Registry, held: str) -> None:
    uri = registry.version("m", missing(perfect(registry.data), 0.5))
    with pytest.raises(PipelineError, match=f"{uri} may lose against {held}: AP -.* on 120 images of labelled"):
        promote(uri, "production")
    assert registry.holder("m") == "1"
    assert registry.tags(uri) == {}


def test_a_difference_within_chance_is_refused(registry: Registry, held: str) -> None:
    uri = registry.version("m", missing(perfect(registry.data), 0.3, seed=6))
    with pytest.raises(PipelineError, match="expected an interval that excludes a loss"):
        promote(uri, "production")


def test_force_moves_the_alias_and_says_so(registry: Registry, held: str) -> None:
    uri = registry.version("m", missing(perfect(registry.data), 0.5))
    assert promote(uri, "production", force=True).moved
    assert registry.holder("m") == "2"
    assert "may lose against" in registry.tags(uri)["forced"]
    assert registry.tags(uri)["interval"]


def test_force_moves_the_alias_from_a_version_that_cannot_be_compared(registry: Registry, held: str) -> None:
    uri = registry.version("m", None)
    assert promote(uri, "production", force=True).comparison is None
    assert registry.holder("m") == "2"
    assert "no detections" in registry.tags(uri)["forced"]


def test_a_later_promotion_replaces_what_an_earlier_one_wrote(registry: Registry, held: str) -> None:
    better = registry.version("m", perfect(registry.data))
    promote(held, "production")
    promote(better, "production")
    promote(held, "production", force=True)
    assert "forced" in registry.tags(held)
    registry.client.delete_registered_model_alias("m", "production")
    promote(held, "production")
    assert set(registry.tags(held)) == {"against", "at", "by"}


def test_the_version_that_has_the_alias_keeps_it_and_its_tags(registry: Registry, held: str) -> None:
    tags = registry.tags(held)
    assert not promote(held, "production").moved
    assert registry.tags(held) == tags


def test_few_images_prove_nothing(registry: Registry, held: str, monkeypatch) -> None:
    monkeypatch.setattr(module, "LEAST_IMAGES", 121)
    uri = registry.version("m", perfect(registry.data))
    with pytest.raises(PipelineError, match="120 images are too few"):
        promote(uri, "production")


def test_images_without_objects_prove_nothing() -> None:
    nothing = Change("AP", -1.0, -1.0, 0.0, 0.0)
    difference: Any = SimpleNamespace(deciding=nothing, images=500)
    comparison = Comparison(("models:/m/1",), ("models:/m/2",), "empty", "/data/empty", "d", "AP", difference)
    with pytest.raises(PipelineError, match=r"empty has no objects .* models:/m/2 loses against models:/m/1"):
        refuse_loss(comparison)


def test_the_alias_moves_last(registry: Registry, held: str, monkeypatch) -> None:
    uri = registry.version("m", perfect(registry.data))

    def fails(*_: object) -> None:
        raise OSError("cut off")

    monkeypatch.setattr("mlflow.MlflowClient.set_model_version_tag", fails)
    with pytest.raises(OSError, match="cut off"):
        promote(uri, "production")
    assert registry.holder("m") == "1"


def test_a_name_that_cannot_be_an_alias_is_refused(registry: Registry) -> None:
    with pytest.raises(PipelineError, match="cannot be an alias"):
        promote(registry.version("m", None), "v1")


def test_other_data_needs_the_data(registry: Registry, held: str) -> None:
    other = grid_data(130)
    with pytest.raises(PipelineError, match="different data"):
        promote(registry.version("m", perfect(other), other), "production")
