import pytest
import torch

from detr.panoptic import PanopticResult, panoptic
from detr.variant import Outputs, SigmoidOutputs

STUFF = [False, True]
SURE = 20.0


def predictions(labels: list[int], masks: torch.Tensor) -> Outputs:
    """Return predictions of one image: query n is sure of `labels[n]`; 2 is "no object"."""
    logits = torch.zeros(1, len(labels), 3)
    logits[0, torch.arange(len(labels)), torch.tensor(labels)] = SURE
    return Outputs(logits, torch.zeros(1, len(labels), 4), masks=masks[None])


def halves(left: float, right: float) -> torch.Tensor:
    return torch.tensor([left, left, right, right]).expand(4, 4)


def divide(outputs: Outputs, original: tuple[int, int] = (16, 16), size: tuple[int, int] = (16, 16)) -> PanopticResult:
    return panoptic(outputs, [original], [size], None, STUFF)[0]


def test_each_pixel_goes_to_the_largest_logit() -> None:
    found = divide(predictions([0, 2, 0], torch.stack([halves(3, -1), halves(9, 9), halves(-2, 1)])))
    assert [(segment.label, segment.query) for segment in found.segments] == [(0, 0), (0, 2)]
    assert found.indices[:, 0].unique().tolist() == [0]
    assert found.indices[:, -1].unique().tolist() == [1]
    assert [segment.area for segment in found.segments] == torch.bincount(found.indices.flatten()).tolist()
    assert found.segments[0].score == pytest.approx(1, abs=1e-6)


def test_stuff_counts_for_its_first_query_and_things_stay_apart() -> None:
    masks = torch.stack([halves(1, 0), halves(0, 1)])
    merged, apart = divide(predictions([1, 1], masks)), divide(predictions([0, 0], masks))
    assert [(segment.query, segment.area) for segment in merged.segments] == [(0, 256)]
    assert [segment.query for segment in apart.segments] == [0, 1]


@pytest.mark.parametrize("labels", [[2, 2], [0, 0]], ids=["nothing-kept", "all-too-small"])
def test_image_without_segments(labels: list[int]) -> None:
    found = divide(predictions(labels, torch.stack([halves(1, 0), halves(0, 1)])), original=(2, 2))
    assert found.segments == ()
    assert found.indices.tolist() == [[-1, -1], [-1, -1]]


def test_result_has_the_original_size_and_nothing_more() -> None:
    found = divide(predictions([0, 0], torch.stack([halves(1, 0), halves(0, 1)])), original=(50, 31), size=(20, 24))
    assert found.indices.shape == (50, 31)
    assert found.indices.dtype == torch.int32
    assert found.indices.untyped_storage().nbytes() == 50 * 31 * 4


def test_padding_is_cut_off() -> None:
    """The image is the left half of its canvas, in which the second query has no pixel."""
    outputs = predictions([0, 0], torch.stack([halves(1, -1), halves(-1, 1)]))
    found = panoptic(outputs, [(16, 8)], [(16, 7)], (16, 16), STUFF)[0]
    assert [(segment.query, segment.area) for segment in found.segments] == [(0, 16 * 8)]


def test_half_precision_and_gradients_are_taken() -> None:
    masks = torch.stack([halves(1, 0), halves(0, 1)])
    expected = divide(predictions([0, 1], masks)).indices
    half = predictions([0, 1], masks)
    half = half._replace(logits=half.logits.bfloat16(), masks=masks[None].bfloat16().requires_grad_())
    assert torch.equal(divide(half).indices, expected)


def test_refusals() -> None:
    outputs, size = predictions([0], halves(1, 1)[None]), [(16, 16)]
    with pytest.raises(ValueError, match="got a sigmoid per class"):
        panoptic(SigmoidOutputs(outputs.logits, outputs.boxes), size, size, None, STUFF)
    with pytest.raises(ValueError, match="got no masks"):
        panoptic(outputs._replace(masks=None), size, size, None, STUFF)
    with pytest.raises(ValueError, match="stuff: got 3, expected one per class, 2"):
        panoptic(outputs, size, size, None, [True] * 3)
    with pytest.raises(ValueError, match="sizes: got 2, expected one per image, 1"):
        panoptic(outputs, size, size * 2, None, STUFF)
