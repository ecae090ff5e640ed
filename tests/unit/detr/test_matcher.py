import pytest
import torch

from detr.batch import Target
from detr.config import LossConfig
from detr.matcher import NonFiniteError, generalized_iou, match
from detr.model import Outputs

torch.manual_seed(0)


def target(objects: int, classes: int = 5, image_id: int = 1) -> Target:
    boxes = torch.rand(objects, 4) * 0.3 + 0.2
    return Target(boxes, torch.randint(0, classes, (objects,)), image_id, (10, 10))


def outputs(images: int, queries: int = 8, classes: int = 5) -> Outputs:
    return Outputs(torch.randn(images, queries, classes + 1), torch.rand(images, queries, 4) * 0.5 + 0.2)


def test_perfect_predictions_are_matched_to_their_objects() -> None:
    truth = target(4)
    order = torch.tensor([2, 0, 3, 1])
    logits = torch.nn.functional.one_hot(truth.labels[order], 6).float() * 10
    (query, found), *_ = match(Outputs(logits[None], truth.boxes[order][None]), [truth], LossConfig())
    assert query.tolist() == [0, 1, 2, 3]
    assert found.tolist() == order.tolist()


def test_an_image_without_objects_matches_nothing() -> None:
    found = match(outputs(3), [target(2), target(0), target(3)], LossConfig())
    assert [len(query) for query, _ in found] == [2, 0, 3]
    assert [len(query) for query, _ in match(outputs(1), [target(0)], LossConfig())] == [0]


def test_more_objects_than_queries_use_every_query() -> None:
    ((query, found),) = match(outputs(1, queries=3), [target(7)], LossConfig())
    assert query.tolist() == [0, 1, 2]
    assert len(set(found.tolist())) == 3


@pytest.mark.parametrize("part", ["logits", "boxes"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_prediction_error_names_the_tensor(part: str, value: float) -> None:
    predicted = outputs(3)
    getattr(predicted, part)[1, 2] = value
    targets = [target(2, image_id=139), target(2, image_id=285), target(1, image_id=632)]
    with pytest.raises(NonFiniteError, match=f"non-finite values in the {part} of images 285, expected"):
        match(predicted, targets, LossConfig())


def test_non_finite_target_boxes_error_names_them() -> None:
    truth = target(2, image_id=285)
    truth.boxes[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="in the target boxes of images 285, expected"):
        match(outputs(2), [target(1, image_id=139), truth], LossConfig())


@pytest.mark.parametrize("off", ["cost_class", "cost_bbox", "cost_giou"])
def test_cost_of_weight_0_has_no_effect(off: str) -> None:
    """Each cost alone would choose another query; with one of them off, the two that agree decide."""
    truth = Target(torch.tensor([[0.5, 0.5, 0.2, 0.2]]), torch.tensor([1]), 1, (10, 10))
    near, wrong = torch.tensor([0.5, 0.5, 0.2, 0.2]), torch.tensor([0.9, 0.9, 0.1, 0.1])
    sure, other = torch.tensor([-9.0, 9, -9, -9, -9, -9]), torch.tensor([9.0, -9, -9, -9, -9, -9])
    if off == "cost_class":
        predicted = Outputs(torch.stack([sure, other])[None], torch.stack([wrong, near])[None])
        best = 1
    else:
        # A thin box inside has the smaller L1 distance and the worse GIoU, a wide box around it the opposite.
        thin, wide = torch.tensor([0.5, 0.5, 0.2, 0.02]), torch.tensor([0.5, 0.5, 0.4, 0.28])
        predicted = Outputs(torch.stack([sure, sure])[None], torch.stack([thin, wide])[None])
        best = 1 if off == "cost_bbox" else 0
    costs = {"cost_class": 1.0, "cost_bbox": 1.0, "cost_giou": 1.0}
    weights = costs | {off: 0.0}
    ((query, _),) = match(predicted, [truth], LossConfig(**weights))
    assert query.tolist() == [best]
    # With the cost that is off above as the only one, the other query is taken.
    ((query, _),) = match(predicted, [truth], LossConfig(**(costs | {off: 1000.0})))
    assert query.tolist() == [1 - best]


@pytest.mark.parametrize("label", [-1, 5])
def test_label_without_a_class_is_refused_on_the_host(label: int) -> None:
    truth = target(2, image_id=42)
    truth.labels[1] = label
    with pytest.raises(ValueError, match=r"image 42: got labels .* expected 0 to 4"):
        match(outputs(1), [truth], LossConfig())


def test_generalised_iou_of_boxes_whose_value_is_known() -> None:
    a = torch.tensor([0.5, 0.5, 0.2, 0.2])
    assert generalized_iou(a, a) == pytest.approx(1.0)
    assert generalized_iou(a, torch.tensor([0.5, 0.5, 0.1, 0.2])).item() == pytest.approx(0.5)
    # Disjoint boxes: the hull is 0.6 x 0.2, of which the boxes cover 0.08.
    assert generalized_iou(a, torch.tensor([0.9, 0.5, 0.2, 0.2])).item() == pytest.approx(-1 / 3)


def test_boxes_without_area_have_a_finite_iou_and_gradient() -> None:
    point = torch.tensor([0.5, 0.5, 0.0, 0.0], requires_grad=True)
    for other in ([0.5, 0.5, 0.0, 0.0], [0.2, 0.5, 0.0, 0.3], [0.5, 0.5, 0.4, 0.4]):
        value = generalized_iou(point, torch.tensor(other))
        value.backward()
        assert -1 <= value <= 1
    assert point.grad is not None
    assert point.grad.isfinite().all()
