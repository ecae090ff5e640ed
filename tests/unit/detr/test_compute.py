"""Compute options change speed and memory but not results."""

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from detr import criterion, matcher
from detr.batch import Target
from detr.compute import arithmetic, autocast, compile_shapes, set_channels_last, set_recompute, uncompiled
from detr.config import LossConfig, ModelConfig
from detr.criterion import compute_losses
from detr.losses import matched
from detr.model import DETR, build_model

SMALL = ModelConfig(
    backbone="resnet18",
    hidden_dim=32,
    heads=4,
    encoder_layers=2,
    decoder_layers=2,
    feedforward_dim=64,
    num_queries=9,
    dropout=0.1,
)


def model(config: ModelConfig = SMALL) -> DETR:
    torch.manual_seed(0)
    return build_model(config, 4).train()


def images() -> Tensor:
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def padding() -> Tensor:
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, :, 64:] = True
    return mask


def step(detector: DETR, precision: str = "fp32") -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of one forward and backward pass, with dropout drawn from a fixed seed."""
    targets = [Target(torch.tensor([[0.5, 0.5, 0.2, 0.3]]), torch.tensor([label]), label, (64, 96)) for label in (1, 3)]
    torch.manual_seed(2)
    with autocast(torch.device("cpu"), precision):
        outputs = detector(images(), padding())
    losses = compute_losses(outputs, targets, 2.0, LossConfig())
    losses.total.backward()
    return losses.total.item(), {name: p.grad for name, p in detector.named_parameters() if p.grad is not None}


def differ(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest difference of a gradient, relative to the largest of its tensor."""
    assert got.keys() == expected.keys()
    return max(
        float((got[name] - value).abs().max() / value.abs().max().clamp(min=1e-6)) for name, value in expected.items()
    )


@pytest.mark.parametrize("modules", ["encoder", "backbone", "both"])
def test_recomputed_activations_give_the_same_gradients_with_dropout(modules: str) -> None:
    expected_loss, expected = step(model())
    detector = model()
    set_recompute(detector, modules)
    loss, gradients = step(detector)
    assert loss == expected_loss
    assert differ(gradients, expected) == 0.0


def saved_bytes(work: Callable[[], object]) -> int:
    """Return the bytes that autograd keeps for the backward pass, counting each storage once."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = work()
    del result
    return sum(kept.values())


@pytest.mark.parametrize("modules", ["encoder", "backbone", "both"])
def test_recomputing_keeps_fewer_activations(modules: str) -> None:
    detector = model()
    before = saved_bytes(lambda: detector(images(), padding()).logits)
    set_recompute(detector, modules)
    assert saved_bytes(lambda: detector(images(), padding()).logits) < before


def test_channels_last_is_the_same_network_under_the_same_names() -> None:
    expected_loss, expected = step(model())
    detector = model()
    set_channels_last(detector)
    assert detector.backbone[0].body.layer2[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)
    loss, gradients = step(detector)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert differ(gradients, expected) < 1e-3
    assert list(detector.state_dict()) == list(model().state_dict())


def test_bf16_rounds_the_network_but_not_boxes_or_losses() -> None:
    detector = model().eval()
    exact = detector(images(), padding())
    with autocast(torch.device("cpu"), "bf16"):
        rounded = detector(images(), padding())
    assert rounded.logits.dtype == torch.bfloat16
    assert rounded.boxes.dtype == torch.float32
    torch.testing.assert_close(rounded.boxes, exact.boxes, atol=0.02, rtol=0)
    assert not torch.equal(rounded.boxes, exact.boxes)
    expected, _ = step(model())
    loss, gradients = step(model(), "bf16")
    assert loss == pytest.approx(expected, rel=0.02)
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients.values())


def test_bf16_matches_and_scores_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, torch.dtype] = {}

    def match(scores: Tensor, boxes: Tensor, *more: Any) -> Any:
        given.update(scores=scores.dtype, boxes=boxes.dtype)
        return matcher.match_layers(scores, boxes, *more)

    def box_losses(boxes: Tensor, *more: Any) -> Any:
        found = matched.box_losses(boxes, *more)
        given.update({name: value.dtype for name, value in found.items()})
        return found

    monkeypatch.setattr(criterion, "match_layers", match)
    monkeypatch.setattr(criterion, "box_losses", box_losses)
    with autocast(torch.device("cpu"), "bf16"):
        assert model()(images(), padding()).logits.dtype == torch.bfloat16
    step(model(), "bf16")
    assert given == dict.fromkeys(("scores", "boxes", "loss_bbox", "loss_giou"), torch.float32)


def test_fp32_means_what_the_options_say_and_only_in_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn

    def now() -> tuple[bool, bool, bool, bool]:
        ordered = torch.are_deterministic_algorithms_enabled()
        return matmul.allow_tf32, cudnn.allow_tf32, ordered, torch.utils.deterministic.fill_uninitialized_memory

    before = now()
    assert before == (False, True, False, True)  # torch's own
    with arithmetic("yes", deterministic=False):
        assert now() == (True, True, False, True)
    with arithmetic("no", deterministic=True):
        assert now() == (False, False, True, False)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        loss, _ = step(model())
    assert now() == before
    assert loss == step(model())[0]
    with arithmetic("auto", deterministic=False):
        assert now() == before
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with arithmetic("auto", deterministic=True):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_frozen_stages_keep_no_activations() -> None:
    body = model().backbone[0].body
    frozen, *trained = body.stage_outputs(images())
    assert not frozen.requires_grad
    assert frozen.grad_fn is None
    assert all(stage.requires_grad for stage in trained)


@pytest.mark.slow
def test_compiled_step_equals_the_uncompiled_one() -> None:
    # One layer of each kind, because compiling for a CPU takes most of a minute.
    config = replace(SMALL, backbone="tiny", encoder_layers=1, decoder_layers=1)
    expected_loss, expected = step(model(config).eval())
    detector = model(config).eval()
    compile_shapes(detector)
    loss, gradients = step(detector)
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    assert differ(gradients, expected) < 1e-2
    with uncompiled():
        torch.testing.assert_close(detector(images()).logits, model(config).eval()(images()).logits)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_step_waits_for_the_device_at_most_twice(precision: str) -> None:
    """The two waits are for the matcher's costs and for the check that the gradient is finite."""
    detector = model().cuda()
    set_channels_last(detector)
    optimizer = torch.optim.AdamW(detector.parameters(), fused=True)
    targets = [Target(torch.tensor([[0.5, 0.5, 0.2, 0.3]]), torch.tensor([label]), label, (64, 96)) for label in (1, 3)]
    inputs, mask = images().cuda(), padding().cuda()

    def train() -> None:
        with autocast(torch.device("cuda"), precision):
            outputs = detector(inputs, mask)
        losses = compute_losses(outputs, targets, 2.0, LossConfig())
        optimizer.zero_grad()
        losses.total.backward()
        norm = torch.nn.utils.clip_grad_norm_(detector.parameters(), 0.1)
        assert torch.isfinite(norm)
        optimizer.step()

    train()  # values that are made once may wait
    try:
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]
    assert len(waits) <= 2, waits


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("layout", ["first", "last"])
def test_training_on_a_device_equals_training_on_the_host(layout: str) -> None:
    detector, twin = model().eval(), model().eval().cuda()
    if layout == "last":
        set_channels_last(twin)
    expected, got = detector(images(), padding()), twin(images().cuda(), padding().cuda())
    torch.testing.assert_close(got.logits.cpu(), expected.logits, atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(got.boxes.cpu(), expected.boxes, atol=5e-3, rtol=5e-3)
