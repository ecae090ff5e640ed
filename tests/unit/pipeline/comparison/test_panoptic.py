"""Comparison and promotion of panoptic versions: PQ decides, and a line says so where it cannot."""

from __future__ import annotations

import pytest

from pipeline.comparison.compare import compare
from pipeline.comparison.models import find_models
from pipeline.comparison.promote import promote
from pipeline.errors import PipelineError
from pipeline.registry.against_holder import note_change
from shards.dataset.manifest import Manifest
from tests.support.panoptic_counts import drawn_counts, panoptic_grid, scored
from tests.support.scored_versions import Registry, missing, perfect

IMAGES = 120


@pytest.fixture
def data() -> Manifest:
    return panoptic_grid(IMAGES)


@pytest.fixture
def kept(registry: Registry, data: Manifest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Return two versions: the second finds fewer objects, and more segments."""
    for name in ("pipeline.comparison.compare", "pipeline.registry.against_holder"):
        monkeypatch.setattr(f"{name}.load_manifest", lambda url: data)
    uris = []
    for detections, found in ((perfect(data), 0.6), (missing(perfect(data), 0.3), 0.9)):
        uris.append(registry.version("p", None, data))
        registry.keep_evaluation(uris[-1], scored(data, detections, drawn_counts(IMAGES, found, 1)), data)
    return uris[0], uris[1]


def test_pq_decides_and_ap_of_things_is_told_besides(kept: tuple[str, str]) -> None:
    found = compare(*kept)
    assert (found.decided_by, found.difference.deciding.name) == ("PQ", "PQ")
    assert found.difference.deciding.low > 0
    by_name = {change.name: change for change in found.difference.figures}
    assert by_name["AP"].high < 0


def test_a_version_of_higher_pq_is_promoted_though_its_ap_is_lower(registry: Registry, kept: tuple[str, str]) -> None:
    promote(kept[0], "production")
    promote(kept[1], "production")
    tags = registry.tags(kept[1])
    assert registry.holder("p") == "2"
    assert "AP" not in tags
    assert tags["PQ"].startswith("0.")
    assert "decided_by" not in tags
    with pytest.raises(PipelineError, match=r"may lose against models:/p/2: PQ -0\."):
        promote(kept[0], "production")


def test_the_remark_about_the_holder_is_of_pq(registry: Registry, kept: tuple[str, str]) -> None:
    before = registry.client.get_model_version("p", "1")
    assert note_change(registry.client, before, "p", "2", "best").startswith("PQ +0.")
    assert "decided by" not in note_change(registry.client, before, "p", "2", "best")


def test_a_model_without_masks_is_compared_by_ap_of_things(
    registry: Registry, data: Manifest, kept: tuple[str, str]
) -> None:
    boxes = registry.version("p", perfect(data), data)
    found = compare(kept[1], boxes)
    assert found.decided_by == "AP of boxes of things, since no segments of models:/p/3 are kept"
    assert found.difference.deciding.name == "AP"
    assert found.difference.deciding.low > 0


@pytest.fixture
def boxes(registry: Registry, data: Manifest, kept: tuple[str, str]) -> str:
    """A version without masks, which finds fewer things than the first."""
    return registry.version("p", missing(perfect(data), 0.5), data)


def test_a_promotion_that_is_refused_by_ap_says_that_pq_was_not_compared(
    registry: Registry, kept: tuple[str, str], boxes: str
) -> None:
    promote(kept[0], "production")
    reason = f"AP of boxes of things, since no segments of {boxes} are kept"
    with pytest.raises(PipelineError, match=f"may lose against .*: AP -.*, decided by {reason}; expected"):
        promote(boxes, "production")
    promote(boxes, "production", force=True)
    assert registry.tags(boxes)["decided_by"] == reason


def test_the_remark_about_a_holder_without_masks_says_that_pq_was_not_compared(registry: Registry, boxes: str) -> None:
    before = registry.client.get_model_version("p", "3")
    remark = note_change(registry.client, before, "p", "2", "best")
    assert remark.endswith("chance (decided by AP of boxes of things, since no segments of version 3 are kept)")


def test_of_a_run_the_version_of_the_highest_pq_is_compared(
    registry: Registry, kept: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = registry.client
    run_id = client.get_model_version("p", "1").run_id
    for number, tags in (("1", {"AP": "0.9", "PQ": "0.1"}), ("3", {"AP": "0.2", "PQ": "0.4"})):
        if number == "3":
            client.create_model_version("p", source="nowhere", run_id=run_id, tags={"step": "7"})
        for key, value in tags.items():
            client.set_model_version_tag("p", number, key, value)
    monkeypatch.setattr("pipeline.comparison.models._best_checkpoint", lambda client, run: None)
    (found,) = find_models(client, "p-1")
    assert found.uri == "models:/p/3"
