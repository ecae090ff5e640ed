import pytest

from pipeline.checkpoint.metadata import deciding_figure
from pipeline.figures import deciding_name, deciding_text
from pipeline.tracking.pages.description import Scored


@pytest.mark.parametrize(
    ("metrics", "name", "text"),
    [
        ({"AP": 0.5}, "AP", "AP 0.500"),
        ({"AP": 0.5, "mask_AP": 0.4}, "mask_AP", "mask AP 0.400"),
        ({"AP": 0.5, "mask_AP": 0.4, "PQ": 0.3}, "PQ", "PQ 0.300"),
    ],
)
def test_pq_decides_before_masks_and_masks_before_boxes(metrics: dict[str, float], name: str, text: str) -> None:
    assert deciding_name(metrics) == name
    assert deciding_text(metrics) == text
    assert deciding_figure(metrics) == metrics[name]
    assert Scored(1, 1.0, metrics).deciding == metrics[name]


def test_two_evaluations_are_compared_by_a_figure_of_both() -> None:
    assert deciding_name({"AP": 0.5, "PQ": 0.3}, {"AP": "0.4"}) == "AP"
    assert deciding_name({"AP": 0.5, "PQ": 0.3}, {"AP": "0.4", "PQ": "0.2"}) == "PQ"
