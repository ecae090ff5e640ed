from dataclasses import replace

import pytest
import torch

from detr.config import ConfigError, DeformableConfig
from tests.support.variants import VARIANTS, built, images

HYBRID, TWO_STAGE = VARIANTS["hybrid"], VARIANTS["two stages"]
REFINED = replace(TWO_STAGE, deformable=DeformableConfig(levels=3, box_refine=True))


def test_one_to_many_queries_change_nothing_for_the_others() -> None:
    model = built(replace(REFINED, deformable=replace(REFINED.deformable, one_to_many_queries=4)))
    in_training = model.train()(*images())
    alone = model.eval()(*images())
    assert in_training.one_to_many is not None
    assert alone.one_to_many is None
    torch.testing.assert_close(in_training.logits, alone.logits)
    torch.testing.assert_close(in_training.boxes, alone.boxes)


def test_too_few_cells_for_the_queries_is_one_line() -> None:
    model = built(TWO_STAGE, num_queries=200)
    with pytest.raises(ConfigError, match=r"have 106 cells.*at least 200.*larger images"):
        model(*images())


def test_an_image_predicts_the_same_beside_a_larger_one() -> None:
    model = built(REFINED).eval()
    both, padding = images()
    alone = model(both[1:, :, :, :56])
    beside = model(both, padding)
    torch.testing.assert_close(beside.boxes[1:], alone.boxes, atol=2e-2, rtol=0)


def test_auxiliary_predictions_outside_training_are_an_option() -> None:
    model = built(HYBRID)
    last = model.eval()(*images())
    assert len(last.auxiliary) == 1
    model.config = replace(model.config, auxiliary=False)
    alone = model(*images())
    assert alone.auxiliary == ()
    assert torch.equal(alone.logits, last.logits)
