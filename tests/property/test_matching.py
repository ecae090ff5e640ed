"""Properties of matching and losses for any predictions and objects."""

from itertools import permutations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detr.batch import Target
from detr.config import LossConfig
from detr.criterion import compute_losses
from detr.matcher import generalized_iou, match
from detr.model import Outputs

CLASSES = 4
SETTINGS = settings(max_examples=60, deadline=None)


@st.composite
def problems(
    draw: st.DrawFn, most_queries: int = 6, most_objects: int = 8, ties: bool = True
) -> tuple[Outputs, list[Target], LossConfig]:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    counts = draw(st.lists(st.integers(0, most_objects), min_size=1, max_size=4))
    queries = draw(st.integers(1, most_queries))
    spread = draw(st.sampled_from([0.0, 30.0, 1.0])) if ties else 1.0  # 0: all classes alike; 30: saturated
    config = LossConfig()
    if ties:
        config = LossConfig(draw(st.sampled_from([0.0, 1.0])), draw(st.sampled_from([0.5, 5.0])), draw(st.floats(0, 4)))
    extent = draw(st.sampled_from([0.0, 0.4])) if ties else 0.4  # 0: boxes without area

    def boxes(*shape: int) -> torch.Tensor:
        return torch.cat([torch.rand(*shape, 2), extent * torch.rand(*shape, 2)], -1)

    layers = [
        Outputs(spread * torch.randn(len(counts), queries, CLASSES + 1), boxes(len(counts), queries)) for _ in range(2)
    ]
    targets = [Target(boxes(n), torch.randint(0, CLASSES, (n,)), i, (9, 9)) for i, n in enumerate(counts)]
    return layers[1]._replace(auxiliary=(layers[0],)), targets, config


def pair_costs(outputs: Outputs, targets: list[Target], config: LossConfig, image: int) -> torch.Tensor:
    truth = targets[image]
    probability = outputs.logits[image].softmax(-1)[:, truth.labels]
    distance = torch.cdist(outputs.boxes[image], truth.boxes, p=1)
    giou = generalized_iou(outputs.boxes[image][:, None], truth.boxes[None])
    return config.cost_bbox * distance - config.cost_class * probability - config.cost_giou * giou


@SETTINGS
@given(problems(most_queries=5, most_objects=5))
def test_matching_has_the_lowest_cost_of_all(problem: tuple[Outputs, list[Target], LossConfig]) -> None:
    outputs, targets, config = problem
    for image, (query, found) in enumerate(match(outputs, targets, config)):
        cost = pair_costs(outputs, targets, config, image)
        if cost.shape[0] < cost.shape[1]:
            rows = [list(zip(range(len(cost)), p, strict=True)) for p in permutations(range(cost.shape[1]), len(cost))]
        else:
            rows = [
                list(zip(p, range(cost.shape[1]), strict=True)) for p in permutations(range(len(cost)), cost.shape[1])
            ]
        best = min(sum(cost[q, t].item() for q, t in pairs) for pairs in rows)
        assert cost[query, found].sum().item() <= best + 1e-4
        assert len(query) == min(cost.shape)
        assert sorted(set(query.tolist())) == query.tolist()
        assert len(set(found.tolist())) == len(found)


@SETTINGS
@given(problems(ties=False))
def test_matching_does_not_depend_on_the_order_of_objects(problem: tuple[Outputs, list[Target], LossConfig]) -> None:
    # Without ties: sums of L1 distances alone are often equal, and any of several equal matchings may be found.
    outputs, targets, config = problem
    shuffled = []
    for target in targets:
        order = torch.randperm(len(target.labels))
        shuffled.append(Target(target.boxes[order], target.labels[order], target.image_id, target.original_size))
    expected = compute_losses(outputs, targets, 3.0, config)
    torch.testing.assert_close(
        compute_losses(outputs, shuffled, 3.0, config).total, expected.total, rtol=1e-4, atol=1e-4
    )


@SETTINGS
@given(problems())
def test_images_are_matched_separately(problem: tuple[Outputs, list[Target], LossConfig]) -> None:
    outputs, targets, config = problem
    together = match(outputs, targets, config)
    for image, target in enumerate(targets):
        (alone,) = match(Outputs(outputs.logits[[image]], outputs.boxes[[image]]), [target], config)
        assert [indices.tolist() for indices in together[image]] == [indices.tolist() for indices in alone]


@SETTINGS
@given(problems(most_queries=5, most_objects=9))
def test_losses_and_gradients_are_finite(problem: tuple[Outputs, list[Target], LossConfig]) -> None:
    outputs, targets, config = problem
    for layer in (outputs, *outputs.auxiliary):
        layer.logits.requires_grad_()
        layer.boxes.requires_grad_()
    losses = compute_losses(outputs, targets, 1.0, config)
    losses.total.backward()
    assert losses.total.isfinite()
    assert all(term.isfinite() for term in losses.parts.values())
    for layer in (outputs, *outputs.auxiliary):
        assert layer.logits.grad is not None
        assert layer.logits.grad.isfinite().all()
        assert layer.boxes.grad is None or layer.boxes.grad.isfinite().all()
