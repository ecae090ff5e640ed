"""AP of every decoder layer, from one forward pass."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from detr.config import ConfigError, DeformableConfig
from detr.model import Outputs, build_model
from pipeline.config import RunConfig
from pipeline.display.tables import layers_table
from pipeline.evaluation import per_layer
from pipeline.evaluation.evaluate_model import Evaluation, evaluate_model, evaluate_readings
from pipeline.evaluation.per_layer import LayerScore, evaluate_layers
from shards.dataset.manifest import Manifest, load_manifest
from tests.support.oracle import OPTIONS, Oracle


class ThreeLayers(nn.Module):
    """A model whose first layer finds every object twice, whose second finds none and whose third finds each once."""

    def __init__(self, oracle: Oracle, config: Any) -> None:
        super().__init__()
        self.oracle, self.config = oracle, config

    def forward(self, images: Tensor, padding: Tensor | None) -> Outputs:
        logits, boxes, *_ = self.oracle(images, padding)
        # Some objects surer than others, so that the second sight of one ranks before the first of another.
        sure = logits * torch.linspace(1, 0.3, logits.shape[1])[:, None]
        twice = Outputs(torch.cat([sure, sure], 1), torch.cat([boxes, 0.98 * boxes], 1))
        blind = Outputs(torch.zeros_like(logits), boxes)
        return Outputs(logits, boxes, (twice, blind) if self.config.auxiliary else ())


@pytest.fixture
def manifest(tiny_data: Any) -> Manifest:
    return load_manifest(tiny_data.val)


def three_layers(manifest: Manifest, tiny_config: RunConfig, auxiliary: bool = True) -> ThreeLayers:
    config = replace(tiny_config.model, decoder_layers=3, auxiliary=auxiliary)
    return ThreeLayers(Oracle(manifest, manifest.categories), config)


def scores(model: Any, manifest: Manifest, **more: Any) -> list[LayerScore]:
    found = evaluate_layers(model, manifest, manifest.categories, OPTIONS, **more)
    assert found is not None
    return found


@pytest.mark.parametrize("auxiliary", [True, False])
def test_suppression_repairs_a_layer_that_finds_objects_twice(
    manifest: Manifest, tiny_config: RunConfig, auxiliary: bool
) -> None:
    model = three_layers(manifest, tiny_config, auxiliary)
    found = scores(model, manifest)
    ap = {(score.layer, score.nms): score.metrics["AP"] for score in found}
    assert list(ap) == [(1, None), (1, 0.7), (2, None), (2, 0.7), (3, None), (3, 0.7), (None, 0.7)]
    assert 0.1 < ap[1, None] < 0.9
    assert ap[2, None] < 0.5
    assert ap[1, 0.7] == ap[3, None] == ap[3, 0.7] == ap[None, 0.7] == pytest.approx(1.0)
    assert model.config.auxiliary is auxiliary


def test_each_image_goes_through_the_model_once(manifest: Manifest, tiny_config: RunConfig) -> None:
    model = three_layers(manifest, tiny_config)
    scores(model, manifest)
    assert model.oracle.calls == [2, 2, 1]


def test_the_nms_threshold_is_an_option_and_must_be_an_iou(manifest: Manifest, tiny_config: RunConfig) -> None:
    model = three_layers(manifest, tiny_config)
    found = scores(model, manifest, nms=0.99)  # the two sights of an object overlap by less
    assert [score.nms for score in found] == [None, 0.99] * 3 + [0.99]
    assert found[0].metrics == found[1].metrics
    with pytest.raises(ConfigError, match="nms: got 7, expected an IoU above 0, at most 1"):
        scores(model, manifest, nms=7)


@pytest.mark.parametrize(
    "options",
    [
        {"auxiliary": True},
        {"auxiliary": False},
        {
            "auxiliary": False,
            "variant": "deformable",
            "hidden_dim": 32,
            "deformable": DeformableConfig(levels=3, box_refine=True, two_stage=True, one_to_many_queries=4),
        },
    ],
    ids=["all layers trained", "last layer trained", "deformable"],
)
def test_the_last_layer_without_suppression_equals_an_evaluation(
    manifest: Manifest, tiny_config: RunConfig, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Evaluation] = []

    def keeping(*arguments: Any, **more: Any) -> list[Evaluation]:
        kept.extend(evaluate_readings(*arguments, **more) or [])
        return kept

    monkeypatch.setattr(per_layer, "evaluate_readings", keeping)
    torch.manual_seed(0)
    model = build_model(replace(tiny_config.model, **options), 4)
    plain = evaluate_model(model, manifest, manifest.categories, OPTIONS)
    scores(model, manifest)
    assert plain is not None
    first, _, last, _, merged = [evaluation.detections for evaluation in kept]
    np.testing.assert_allclose(last.boxes_xywh, plain.detections.boxes_xywh, rtol=1e-6)
    np.testing.assert_allclose(last.scores, plain.detections.scores, rtol=1e-6)
    assert not np.allclose(first.scores, last.scores, rtol=1e-3)
    assert set(merged.scores) <= {*first.scores, *last.scores}
    assert len(merged) < len(first) + len(last)


def test_the_table_has_a_line_per_layer_and_one_for_all() -> None:
    kinds = [(1, None, 0.25), (1, 0.6, 0.5), (2, None, -1.0), (2, 0.6, 0.75), (None, 0.6, 1.0)]
    table = layers_table([LayerScore(layer, nms, {"AP": ap, "AP50": ap / 2}) for layer, nms, ap in kinds])
    assert [line.split() for line in table.splitlines()[2:]] == [
        ["1", "0.250", "0.125", "0.500", "0.250"],
        ["2", "-", "-", "0.750", "0.375"],
        ["all", "merged", "-", "-", "1.000", "0.500"],
    ]
    assert "AP, NMS 0.6" in table.splitlines()[0]
