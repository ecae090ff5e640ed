"""Deformable DETR and hybrid matching against figures of their originals; the golden folders' README files have the rules.

The tolerances are those of section 6 of the first README. Everything in fp64 against the figures in fp64 is the sharp test.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from detr.matcher import match
from detr.postprocess import detect
from detr.variant import SigmoidOutputs
from pipeline.config import OptimConfig
from tests.support.real_data import GOLDEN
from tests.support.variant_figures import OUTPUTS, Case, assert_trains_alike, clearly_ranked, pairs, relative

pytestmark = pytest.mark.skipif(
    not (GOLDEN / "deformable/r50.json").exists(),
    reason=f"no golden figures in {GOLDEN}; set DETR_GOLDEN to their folder",
)
CASES = [
    "deformable/small_plain",
    "deformable/small_refine",
    "deformable/small_two_stage",
    "deformable/small_two_stage_few_cells",
    "deformable/small_points",
    "deformable/single_scale",
    "deformable/single_scale_dc5",
    # Images of true size: minutes. The names and shapes of R50 are compared in any case.
    *(pytest.param(f"deformable/{name}", marks=pytest.mark.slow) for name in ("r50", "r50_refine", "r50_two_stage")),
    "hybrid/hybrid_plain",
    "hybrid/hybrid_refine",
    "hybrid/hybrid_two_stage",
    "hybrid/hybrid_two_stage_tricks",
    "hybrid/look_forward_twice",
    "hybrid/mixed_selection",
]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param.split("/"))


@pytest.fixture(scope="module")
def outputs(case: Case) -> SigmoidOutputs:
    with torch.no_grad():
        result: SigmoidOutputs = case.model().eval()(case.images, case.padding)
    return result


@pytest.fixture(scope="module")
def trained(case: Case) -> SigmoidOutputs:
    with torch.no_grad():
        result: SigmoidOutputs = case.model().train()(case.images, case.padding)
    return result


def firm(case: Case, image: int, array: Any) -> Any:
    """Leave out the queries whose place in the ranking of proposals rounding can change."""
    loose = case.expected.get("loose_queries", [[], []])[image]
    return np.delete(np.asarray(array), [query for query in loose if query < len(array)], 0)


def assert_close_by_query(case: Case, got: Tensor, expected: Any) -> None:
    for image in range(len(got)):
        assert relative(firm(case, image, got[image]), firm(case, image, expected[image])) <= OUTPUTS


def test_predictions_of_every_layer(case: Case, outputs: SigmoidOutputs) -> None:
    prefix = "eval_" if "eval_pred_logits" in case.arrays else ""
    assert_close_by_query(case, outputs.logits, case.arrays[f"{prefix}pred_logits"])
    assert_close_by_query(case, outputs.boxes, case.arrays[f"{prefix}pred_boxes"])
    if prefix:
        return
    for index, layer in enumerate(outputs.auxiliary):
        assert_close_by_query(case, layer.boxes, case.arrays[f"aux{index}_pred_boxes"])
        if not case.true_size:
            assert_close_by_query(case, layer.logits, case.arrays[f"aux{index}_pred_logits"])
        elif "loose_queries" not in case.expected:
            assert relative(layer.logits[:, ::10, ::7], case.arrays[f"aux{index}_pred_logits"]) <= OUTPUTS


def test_predictions_in_training(case: Case, trained: SigmoidOutputs) -> None:
    """Those of hybrid matching, of the encoder, and the one-to-one queries beside the others."""
    if "enc_pred_boxes" in case.arrays:
        assert trained.encoder is not None
        assert relative(trained.encoder.boxes, case.arrays["enc_pred_boxes"]) <= OUTPUTS
        assert relative(trained.encoder.logits[..., 0], case.arrays["enc_class0_logits"]) <= OUTPUTS
    assert (trained.one_to_many is not None) == ("pred_logits_one2many" in case.arrays)
    if trained.one_to_many is not None:
        assert_close_by_query(case, trained.logits, case.arrays["pred_logits"])
        own = case.config.num_queries
        layers = [(trained, trained.one_to_many, "")]
        before = zip(trained.auxiliary, trained.one_to_many.auxiliary, strict=True)
        layers += [(one, many, f"aux{i}_") for i, (one, many) in enumerate(before)]
        for one, many, suffix in layers:
            for name in ("logits", "boxes"):
                both = torch.cat([getattr(one, name), getattr(many, name)], 1)
                expected = case.arrays[f"{suffix}pred_{name}_one2many"]
                for image in range(len(both)):
                    loose = [q - own for q in case.expected.get("loose_queries", [[], []])[image] if q >= own]
                    got = np.delete(np.asarray(both[image, own:]), loose, 0)
                    assert relative(got, np.delete(expected[image], loose, 0)) <= OUTPUTS


def test_assignments(case: Case, outputs: SigmoidOutputs, trained: SigmoidOutputs) -> None:
    last = trained if "eval_pred_logits" in case.arrays else outputs
    layers = [("", "last", last), *((f"aux{i}_", f"aux{i}", layer) for i, layer in enumerate(last.auxiliary))]
    for prefix, fairness, layer in layers:
        if not case.expected["matching_is_fair"][fairness]:
            continue
        for image, found in enumerate(match(layer, case.targets, case.loss_config)):
            loose = case.expected.get("loose_queries", [[], []])[image]
            got, expected = pairs(found), pairs(case.arrays[f"{prefix}match{image}"])
            assert {pair for pair in got ^ expected if pair[0] not in loose} == set()


def test_detections(case: Case, outputs: SigmoidOutputs) -> None:
    for image, found in enumerate(detect(outputs, [target.original_size for target in case.targets])):
        expected = {name: case.arrays[f"post{image}_{name}"] for name in ("scores", "labels", "boxes")}
        assert relative(found.scores, expected["scores"]) <= OUTPUTS
        apart = clearly_ranked(expected["scores"])
        assert (found.labels.numpy() == expected["labels"])[apart].all()
        assert relative(found.boxes_xyxy.numpy()[apart], expected["boxes"][apart]) <= OUTPUTS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_losses_gradients_and_steps(case: Case, dtype: torch.dtype) -> None:
    """Three AdamW steps with the project's own optimizer: its groups, rates and clipping."""
    assert_trains_alike(case, dtype, OptimConfig(lr=2e-4, lr_backbone=2e-5))
