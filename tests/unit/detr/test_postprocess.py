import pytest
import torch

from detr.model import Outputs
from detr.postprocess import Detection, detect


def test_detections_have_object_classes_and_pixel_boxes() -> None:
    logits = torch.tensor([[[0.0, 2.0, 5.0], [3.0, 0.0, 0.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.5, 1.0], [0.25, 0.1, 0.5, 0.4]]])
    (found,) = detect(Outputs(logits, boxes), [(100, 200)])
    assert found.labels.tolist() == [1, 0]
    torch.testing.assert_close(found.scores, logits[0].softmax(-1)[[0, 1], [1, 0]])
    torch.testing.assert_close(found.boxes_xyxy, torch.tensor([[50.0, 0, 150, 100], [0, -10, 100, 30]]))


def test_wrong_number_of_sizes_is_refused() -> None:
    outputs = Outputs(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
    assert len(detect(outputs, torch.tensor([[10, 20], [30, 40]]))) == 2
    with pytest.raises(ValueError, match="got 1, expected one per image, 2"):
        detect(outputs, [(10, 20)])


def test_no_images_give_no_detections() -> None:
    assert detect(Outputs(torch.zeros(0, 3, 4), torch.zeros(0, 3, 4)), []) == []


def drawn(images: int = 2, queries: int = 40, layers: int = 3, classes: int = 3) -> Outputs:
    """Return predictions whose boxes overlap a lot and extend beyond the edges."""
    torch.manual_seed(0)

    def layer() -> Outputs:
        boxes = torch.cat([torch.rand(images, queries, 2), 0.6 + 0.3 * torch.rand(images, queries, 2)], -1)
        return Outputs(torch.randn(images, queries, classes + 1), boxes)

    *auxiliary, last = [layer() for _ in range(layers)]
    return last._replace(auxiliary=tuple(auxiliary))


def suppressed(found: Detection, threshold: float) -> list[int]:
    """Return the kept indices of greedy suppression by its definition, one pair at a time."""
    kept: list[int] = []
    for index in found.scores.argsort(descending=True).tolist():
        rivals = [other for other in kept if found.labels[other] == found.labels[index]]
        if all(iou(found.boxes_xyxy[index], found.boxes_xyxy[other]) <= threshold for other in rivals):
            kept.append(index)
    return kept[:100]


def iou(a: torch.Tensor, b: torch.Tensor) -> float:
    ax, ay, bx, by = a.tolist()
    cx, cy, dx, dy = b.tolist()
    overlap = max(0.0, min(bx, dx) - max(ax, cx)) * max(0.0, min(by, dy) - max(ay, cy))
    return overlap / ((bx - ax) * (by - ay) + (dx - cx) * (dy - cy) - overlap)


SIZES = [(480, 640), (333, 500)]


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.7])
@pytest.mark.parametrize("merge", [False, True])
def test_nms_keeps_the_best_of_each_class_in_order(threshold: float, merge: bool) -> None:
    outputs = drawn()
    layers = (*outputs.auxiliary, outputs) if merge else (outputs,)
    every = [detect(layer._replace(auxiliary=()), SIZES) for layer in layers]
    for image, found in enumerate(detect(outputs, SIZES, nms=threshold, merge=merge)):
        layers_of_image = [layer[image] for layer in every]
        together = Detection(
            *(
                torch.cat([getattr(layer, name) for layer in layers_of_image])
                for name in ("scores", "labels", "boxes_xyxy")
            )
        )
        kept = suppressed(together, threshold)
        assert 0 < len(kept) < len(together.scores)
        assert torch.equal(found.scores, together.scores[kept])
        assert torch.equal(found.labels, together.labels[kept])
        assert torch.equal(found.boxes_xyxy, together.boxes_xyxy[kept])


def test_nms_keeps_boxes_of_other_classes_beyond_the_edges() -> None:
    """Torchvision moves classes apart by the largest coordinate alone, by which these would still overlap."""
    boxes = torch.tensor([[[0.8, 0.8, 0.8, 0.8], [0.1, 0.1, 0.8, 0.8]]])
    logits = torch.tensor([[[9.0, 0, 0], [0, 8.0, 0]]])
    (found,) = detect(Outputs(logits, boxes), [(100, 100)], nms=0.01)
    assert found.labels.tolist() == [0, 1]


def test_nms_keeps_at_most_a_hundred_detections() -> None:
    outputs = drawn(images=1, queries=60, layers=3, classes=1)
    centres = torch.arange(180).view(3, 1, 60, 1) / 180
    boxes = torch.cat([centres, torch.full((3, 1, 60, 3), 1e-3)], -1)  # none overlaps another
    apart = [Outputs(layer.logits, box) for layer, box in zip((*outputs.auxiliary, outputs), boxes, strict=True)]
    (found,) = detect(apart[2]._replace(auxiliary=tuple(apart[:2])), [(480, 640)], nms=0.7, merge=True)
    scores = torch.cat([layer.logits.softmax(-1)[0, :, 0] for layer in apart])
    torch.testing.assert_close(found.scores, scores.sort(descending=True).values[:100])


def test_merge_without_nms_and_wrong_thresholds_are_refused() -> None:
    outputs = drawn()
    with pytest.raises(ValueError, match="merge: got nms=None, expected an IoU"):
        detect(outputs, SIZES, merge=True)
    for threshold in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="nms: got"):
            detect(outputs, SIZES, nms=threshold)


def test_nms_accepts_no_images_and_no_queries() -> None:
    assert detect(Outputs(torch.zeros(0, 3, 4), torch.zeros(0, 3, 4)), [], nms=0.7) == []
    (found,) = detect(Outputs(torch.zeros(1, 0, 4), torch.zeros(1, 0, 4)), [(5, 5)], nms=0.7)
    assert len(found.scores) == 0
