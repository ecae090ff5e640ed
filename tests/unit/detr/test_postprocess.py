import pytest
import torch

from detr.model import Outputs
from detr.postprocess import detect


def test_the_best_class_is_never_no_object_and_boxes_are_pixels() -> None:
    logits = torch.tensor([[[0.0, 2.0, 5.0], [3.0, 0.0, 0.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.5, 1.0], [0.25, 0.1, 0.5, 0.4]]])
    (found,) = detect(Outputs(logits, boxes), [(100, 200)])
    assert found.labels.tolist() == [1, 0]
    torch.testing.assert_close(found.scores, logits[0].softmax(-1)[[0, 1], [1, 0]])
    torch.testing.assert_close(found.boxes_xyxy, torch.tensor([[50.0, 0, 150, 100], [0, -10, 100, 30]]))


def test_sizes_are_one_per_image() -> None:
    outputs = Outputs(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
    assert len(detect(outputs, torch.tensor([[10, 20], [30, 40]]))) == 2
    with pytest.raises(ValueError, match="got 1, expected one per image, 2"):
        detect(outputs, [(10, 20)])


def test_no_images_give_no_detections() -> None:
    assert detect(Outputs(torch.zeros(0, 3, 4), torch.zeros(0, 3, 4)), []) == []
