"""Comparison of models by their kept detections."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.comparison import compare as module
from pipeline.comparison.compare import compare
from pipeline.errors import PipelineError
from pipeline.evaluation.evaluate_model import Evaluation
from pipeline.evaluation.kept import KEPT_NAME, keep, to_bytes
from shards.score.coco_eval import coco_metrics, score_detections
from tests.support.scored_versions import Registry, grid_data, missing, perfect, shaken


def test_versions_are_compared_without_running_them(registry: Registry) -> None:
    good = perfect(registry.data)
    worse = missing(good, 0.2)
    before, after = registry.version("m", good), registry.version("m", worse)
    found = compare(before, after)
    assert (found.before, found.after, found.digest) == ((before,), (after,), registry.data.digest)
    change = found.difference.deciding
    assert (change.before, change.after) == (
        coco_metrics(registry.data, good)["AP"],
        coco_metrics(registry.data, worse)["AP"],
    )
    assert change.high < 0


def test_an_alias_names_a_version(registry: Registry) -> None:
    uri = registry.version("m", perfect(registry.data))
    registry.client.set_registered_model_alias("m", "best", "1")
    assert compare("models:/m@best", uri).difference.deciding.difference == 0


def test_a_run_is_its_best_version_where_its_checkpoints_cannot_be_seen(registry: Registry, monkeypatch) -> None:
    uri = registry.version("m", perfect(registry.data))
    monkeypatch.setattr("pipeline.comparison.models._best_checkpoint", lambda client, run: None)
    found = compare("m-1", uri)
    assert (found.before, found.difference.deciding.difference) == (("m-1",), 0)


def test_several_runs_of_a_side_are_a_mean_with_a_deviation(registry: Registry, monkeypatch) -> None:
    good = perfect(registry.data)
    uris = [registry.version("m", shaken(good, seed)) for seed in range(3)]
    other = registry.version("n", missing(good, 0.3))
    monkeypatch.setattr("pipeline.comparison.models._best_checkpoint", lambda client, run: None)
    by_commas, by_pattern = compare(",".join(uris), other), compare("m-*", other)
    assert by_commas.difference == by_pattern.difference
    assert by_pattern.before == ("m-1", "m-2", "m-3")
    assert len(set(by_commas.difference.before_runs)) == 3


def test_other_data_is_refused(registry: Registry) -> None:
    other = grid_data(50)
    before, after = registry.version("m", perfect(registry.data)), registry.version("m", perfect(other), other)
    with pytest.raises(
        PipelineError, match=r"different data \(digests: models:/m/1 on .*expected the same data: give --data"
    ):
        compare(before, after)


def test_of_several_common_data_sets_the_validation_data_counts(registry: Registry) -> None:
    first = next(data for data in map(grid_data, range(10, 100)) if data.digest < registry.data.digest)
    uris = [registry.version("m", perfect(registry.data)) for _ in range(2)]
    for uri in uris:
        registry.keep(uri, perfect(first), first)
    assert compare(*uris).digest == registry.data.digest


def test_several_common_data_sets_that_none_was_validated_on_are_refused(registry: Registry) -> None:
    uris = [registry.version("m", None) for _ in range(2)]
    for uri in uris:
        for data in (grid_data(30), grid_data(40)):
            registry.keep(uri, perfect(data), data)
    with pytest.raises(PipelineError, match=r"all evaluated on 2 data sets .*validated on: give --data URL"):
        compare(*uris)


def test_data_that_changed_since_is_refused(registry: Registry, monkeypatch) -> None:
    uri = registry.version("m", perfect(registry.data))
    monkeypatch.setattr(module, "load_manifest", lambda url: grid_data(50))
    with pytest.raises(PipelineError, match="is not the data any more that the models were evaluated on"):
        compare(uri, uri)


def test_a_version_without_kept_detections_needs_data(registry: Registry) -> None:
    before, after = registry.version("m", perfect(registry.data)), registry.version("m", None)
    with pytest.raises(PipelineError, match=r"no detections of models:/m/2 on any data set were kept.*give --data URL"):
        compare(before, after)


def test_a_version_without_kept_detections_is_evaluated_once(registry: Registry, monkeypatch) -> None:
    good = perfect(registry.data)
    before, after = registry.version("m", good), registry.version("m", None)
    evaluated: list[str] = []

    def evaluate(uri: str, data: str, *, progress: bool) -> Evaluation:
        evaluated.append(uri)
        return Evaluation(score_detections(registry.data, good), good, np.arange(registry.data.images))

    monkeypatch.setattr("pipeline.inference.evaluate.evaluate", evaluate)
    for _ in range(2):
        assert compare(before, after, "data").difference.deciding.difference == 0
    assert evaluated == [after]


def test_a_run_evaluated_on_fewer_images_is_evaluated_on_all_once(registry: Registry, monkeypatch, tmp_path) -> None:
    good, fewer = perfect(registry.data), registry.data.index().images["image_id"][:10].astype(np.int64)
    whole = Evaluation(score_detections(registry.data, good), good, np.arange(registry.data.images))
    of_run = replace(whole, detections=good.take(np.isin(good.image_ids, fewer)), rows=np.arange(10))
    (tmp_path / KEPT_NAME).write_bytes(to_bytes(keep(registry.data, of_run)))
    other = registry.version("m", good)
    uri = registry.version("n", None)
    monkeypatch.setattr("pipeline.comparison.models._best_checkpoint", lambda client, run: (tmp_path, 7))
    evaluated: list[str] = []

    def evaluate(uri: str, data: str, *, progress: bool) -> Evaluation:
        evaluated.append(uri)
        return whole

    monkeypatch.setattr("pipeline.inference.evaluate.evaluate", evaluate)
    with pytest.raises(PipelineError, match=r"120 and on 10 images .* give --data URL"):
        compare(other, "n-1")
    for url in ("data", "data", None):
        assert compare(other, "n-1", url).difference.images == 120
    assert evaluated == [uri]
    registry.client.create_run(registry.experiment, run_name="alone", tags={"detr.folder": "/nowhere"})
    with pytest.raises(PipelineError, match=r"detections of alone on all 120 images of .*`detr register alone"):
        compare(other, "alone", "data")


def test_a_run_that_is_not_registered_cannot_be_evaluated(registry: Registry, monkeypatch, tmp_path) -> None:
    registry.version("m", perfect(registry.data))
    registry.client.create_run(registry.experiment, run_name="alone", tags={"detr.folder": "/nowhere"})
    monkeypatch.setattr("pipeline.comparison.models._best_checkpoint", lambda client, run: (tmp_path, 3))
    with pytest.raises(PipelineError, match="`detr register alone --name NAME`"):
        compare("models:/m/1", "alone", "data")


@pytest.mark.parametrize(
    ("text", "message"), [(" , ", "expected models:/NAME/VERSION"), ("x-*", "no run has a name like")]
)
def test_a_side_without_a_model_is_refused(registry: Registry, text: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        compare(text, "models:/m/1")


def test_of_a_model_with_masks_a_line_names_the_figure_that_decides(registry: Registry) -> None:
    good = perfect(registry.data)
    scored = Evaluation(score_detections(registry.data, good), good, np.arange(registry.data.images))
    with_masks = replace(scored.score, metrics=scored.score.metrics | {"mask_AP": 0.5})
    boxes, masks = registry.version("m", good), registry.version("m", None)
    registry.keep_evaluation(masks, replace(scored, score=with_masks), registry.data)
    assert compare(boxes, masks).decided_by == "AP of boxes, since masks are not kept; @best goes by AP of masks"
    assert compare(boxes, boxes).decided_by == "AP"
