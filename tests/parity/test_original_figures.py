"""The model against figures measured with the original implementation; the rules are in the golden folder's README."""

import json
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from detr.backbone import FrozenBatchNorm
from detr.batch import Target
from detr.config import LossConfig, ModelConfig
from detr.criterion import Losses, compute_losses
from detr.matcher import match
from detr.model import DETR, Outputs, build_model
from detr.original import load_original_state_dict, to_original_state_dict
from detr.postprocess import detect
from tests.support.real_data import GOLDEN

ROOT = Path(__file__).parents[2]
RELATIVE = 1e-4

pytestmark = pytest.mark.skipif(
    not (GOLDEN / "r50.json").exists(), reason=f"no golden figures in {GOLDEN}; set DETR_GOLDEN to their folder"
)

CASES = {
    "r50": ModelConfig(dropout=0.0),
    "r101": ModelConfig(backbone="resnet101", dropout=0.0),
    "r50_dc5": ModelConfig(dilation=True, dropout=0.0),
    "r50_learned_pos_pre_norm": ModelConfig(position="learned", pre_norm=True, dropout=0.0),
    "r50_panoptic": ModelConfig(masks=True, dropout=0.0),
}
CLASSES = {"r50_panoptic": 250}


def rng(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def filled(key: str, shape: torch.Size) -> Tensor:
    r = rng(key)
    z = r.standard_normal(tuple(shape))
    if key.endswith("running_var"):
        value = 0.5 + r.random(tuple(shape))
    elif key.endswith("weight") and len(shape) == 1:
        value = 1 + 0.1 * z
    elif any(name in key for name in ("query_embed", "row_embed", "col_embed")):
        value = z
    elif len(shape) == 1:
        value = 0.1 * z
    else:
        gain = 3.0 if key.endswith("in_proj_weight") else 1.5
        value = gain * z / np.sqrt(np.prod(shape[1:]))
    return torch.tensor(value, dtype=torch.float32)


def drawn_target(r: np.random.Generator, objects: int, classes: range, image_id: int, size: tuple[int, int]) -> Target:
    centres, extents = 0.25 + 0.5 * r.random((objects, 2)), 0.05 + 0.4 * r.random((objects, 2))
    labels = torch.from_numpy(r.integers(classes.start, classes.stop, objects))
    return Target(torch.tensor(np.concatenate([centres, extents], 1), dtype=torch.float32), labels, image_id, size)


def box_masks(boxes: Tensor, height: int, width: int) -> Tensor:
    """Each box filled: bool [N, height, width]."""
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (cx, cy, w, h) in zip(masks, boxes.tolist(), strict=True):
        top, bottom = int((cy - h / 2) * height), int((cy + h / 2) * height) + 1
        left, right = int((cx - w / 2) * width), int((cx + w / 2) * width) + 1
        mask[max(top, 0) : bottom, max(left, 0) : right] = True
    return masks


def close(got: Any, expected: Any, relative: float = RELATIVE, floor: float = 0.0) -> None:
    """Compare within `relative` of the largest magnitude expected (single values: of themselves), or of `floor`."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    if got.size:
        error = np.abs(got - expected).max() / max(np.abs(expected).max(), floor, 1e-12)
        assert error <= relative, f"relative error {error:.1e}"


class Case:
    """One golden case: the model with its filled weights, the batch and the expected figures."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.expected: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text())
        self.arrays = dict(np.load(GOLDEN / f"{name}.npz"))
        sizes = [tuple(size) for size in self.expected["meta"]["sizes"]]
        height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
        self.images = torch.zeros(len(sizes), 3, height, width)
        self.padding = torch.ones(len(sizes), height, width, dtype=torch.bool)
        self.targets = []
        for i, ((h, w), objects) in enumerate(zip(sizes, self.expected["meta"]["targets"], strict=True)):
            image = rng(f"{name}/image{i}").standard_normal((3, h, w))
            self.images[i, :, :h, :w] = torch.tensor(image, dtype=torch.float32)
            self.padding[i, :h, :w] = False
            target = drawn_target(rng(f"{name}/target{i}"), objects, range(1, 91), i, (2 * h, 2 * w))
            self.targets.append(replace(target, masks=box_masks(target.boxes, h, w)))
        self.num_boxes = float(max(sum(self.expected["meta"]["targets"]), 1))

    def model(self) -> DETR:
        model = build_model(CASES[self.name], CLASSES.get(self.name, 91))
        state = {key: filled(key, value.shape) for key, value in to_original_state_dict(model).items()}
        load_original_state_dict(model, state)
        return model

    def losses(self, model: DETR) -> Losses:
        images = self.images.to(model.query_embed.weight.dtype)
        return compute_losses(model(images, self.padding), self.targets, self.num_boxes, LossConfig())


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.fixture(scope="module")
def outputs(case: Case) -> Outputs:
    with torch.no_grad():
        result: Outputs = case.model().eval()(case.images, case.padding)
    return result


def test_predictions_of_every_layer_are_the_originals(case: Case, outputs: Outputs) -> None:
    close(outputs.logits, case.arrays["pred_logits"])
    close(outputs.boxes, case.arrays["pred_boxes"])
    close(outputs.auxiliary[0].logits, case.arrays["aux0_pred_logits"])
    for index, layer in enumerate(outputs.auxiliary):
        close(layer.boxes, case.arrays[f"aux{index}_pred_boxes"])
    assert (outputs.masks is not None) == ("pred_masks_top4" in case.arrays)
    if outputs.masks is not None:
        close(outputs.masks[:, :4], case.arrays["pred_masks_top4"])


def test_detections_are_the_originals(case: Case, outputs: Outputs) -> None:
    for index, found in enumerate(detect(outputs, [target.original_size for target in case.targets])):
        close(found.scores, case.arrays[f"post{index}_scores"])
        close(found.boxes_xyxy, case.arrays[f"post{index}_boxes"])
        assert (found.labels.numpy() == case.arrays[f"post{index}_labels"]).mean() >= 0.99


def test_losses_and_sizes_are_the_originals(case: Case) -> None:
    model, expected = case.model().train(), case.expected
    assert sum(p.numel() for p in model.parameters()) == expected["parameters"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected["trainable_parameters"]
    losses = case.losses(model)
    assert losses.parts.keys() == expected["losses"].keys()
    for name, value in losses.parts.items():
        close(value, expected["losses"][name])
    close(losses.total.item(), expected["loss"])


# The original's fp32 gradients are themselves up to 9.7e-5 (post-norm) and 1.3e-3 (pre-norm, in layer2) away from exact
# arithmetic: a rounding difference decides on which side of 0 a ReLU's input falls. So ours are taken in fp64, where they
# are the same on every machine. In fp32 with the original's order of operations (norm after the convolution, two
# threads) every parameter of every case is within 7e-5, and the three losses below within 6e-6.
GRADIENT_TOLERANCE = {"r50_learned_pos_pre_norm": 2e-3}
STEP_TOLERANCE = [(1e-4, 1e-4), (1e-4, 2e-3), (1e-3, 1e-2)]  # of loss and gradient norm: the difference grows each step


def test_gradients_and_steps_are_the_originals(case: Case) -> None:
    """Gradients per parameter, then consecutive AdamW steps with clipping."""
    expected = case.expected
    steps = _steps(case, case.model().train().double())
    for step, ((losses, norms, total_norm), tolerances) in enumerate(zip(steps, STEP_TOLERANCE, strict=False)):
        if step == 0:
            assert norms.keys() == expected["grad_norms"].keys()
            # Gradients that vanish in exact arithmetic (of key biases, say) are rounding noise in the figures.
            floor = 1e-4 * expected["grad_norm_per_step"][0]
            for name, value in norms.items():
                close(value, expected["grad_norms"][name], GRADIENT_TOLERANCE.get(case.name, RELATIVE), floor)
        close(losses.total.item(), expected["loss_per_step"][step], tolerances[0])
        close(total_norm, expected["grad_norm_per_step"][step], tolerances[1])


def _norm_after_convolution(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    if not isinstance(norm, FrozenBatchNorm):
        return norm(conv(x))
    scale, shift = norm.scale_and_shift()
    return conv(x) * scale[:, None, None] + shift[:, None, None]


@pytest.fixture
def two_threads() -> Iterator[None]:
    """As many as the figures were measured with: another number sums in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_three_steps_of_r50_in_fp32_have_the_originals_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the original's order of operations, since these weights amplify rounding 1000-fold from step to step.

    Where even the first loss is not the figure's to the last bit, the processor sums in another order than the one the
    figures were measured on, and the third step compares rounding: the fp64 test above then stands alone.
    """
    monkeypatch.setattr("detr.backbone._convolve", _norm_after_convolution)
    case = Case("r50")
    for step, (losses, _, _) in enumerate(_steps(case, case.model().train())):
        loss, expected = losses.total.item(), case.expected["loss_per_step"][step]
        if step == 0 and loss != expected:
            close(loss, expected)
            pytest.skip(
                f"this processor rounds otherwise than the one of the figures: first loss {loss} for {expected}"
            )
        close(loss, expected)


def _steps(case: Case, model: DETR) -> Iterator[tuple[Losses, dict[str, float], float]]:
    """Consecutive AdamW steps with the original's rates and clipping: losses, gradient norms per parameter, and total."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for name, p in trained.items() if not name.startswith("backbone")]},
        {"params": [p for name, p in trained.items() if name.startswith("backbone")], "lr": 1e-5},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=1e-4)
    for _ in range(case.expected["meta"]["steps"]):
        optimizer.zero_grad()
        losses = case.losses(model)
        losses.total.backward()
        norms = {original_name(model, name): p.grad.norm().item() for name, p in trained.items() if p.grad is not None}
        yield losses, norms, torch.nn.utils.clip_grad_norm_(trained.values(), 0.1).item()
        optimizer.step()


def original_name(model: DETR, name: str) -> str:
    masked = model.config.masks and not name.startswith(("bbox_attention.", "mask_head."))
    return f"detr.{name}" if masked else name


def criterion_cases() -> list[dict[str, Any]]:
    path = GOLDEN / "criterion.json"
    return json.loads(path.read_text()) if path.exists() else []


@pytest.mark.parametrize("expected", criterion_cases(), ids=lambda expected: expected["name"])
def test_criterion_is_the_originals(expected: dict[str, Any]) -> None:
    r, counts = rng(expected["name"]), expected["targets"]
    batch, queries, classes = len(counts), expected["queries"], expected["classes"]
    drawn = []
    for _ in range(expected["layers"]):
        logits = torch.tensor(2 * r.standard_normal((batch, queries, classes + 1)), dtype=torch.float32)
        centres, extents = r.random((batch, queries, 2)), 0.02 + 0.6 * r.random((batch, queries, 2))
        boxes = torch.tensor(np.concatenate([centres, extents], -1), dtype=torch.float32)
        drawn.append(Outputs(logits.requires_grad_(), boxes.requires_grad_()))
    targets = [drawn_target(r, objects, range(classes), i, (1, 1)) for i, objects in enumerate(counts)]
    for layer, assignments in zip(drawn, expected["assignments"], strict=True):
        got = [[query.tolist(), target.tolist()] for query, target in match(layer, targets, LossConfig())]
        assert got == assignments

    outputs = drawn[-1]._replace(auxiliary=tuple(drawn[:-1]))
    losses = compute_losses(outputs, targets, max(sum(counts), 1), LossConfig())
    assert losses.parts.keys() == expected["losses"].keys()
    for name, value in losses.parts.items():
        close(value, expected["losses"][name])
    close(losses.total.item(), expected["loss"])
    losses.total.backward()
    for kind in ("logits", "boxes"):
        norms = [getattr(layer, kind).grad.norm().item() for layer in drawn]
        close(norms, expected[f"grad_{kind}_norm"])
