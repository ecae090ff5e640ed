import copy
import operator

import pytest
import torch
import torchvision
from torch import nn

from detr import backbone
from detr.backbone import Backbone, FrozenBatchNorm, ResNet
from detr.config import ModelConfig
from detr.original import load_backbone_weights


def with_drawn_statistics(module: nn.Module) -> nn.Module:
    """Give every norm other statistics than 0 and 1, so that a wrong use of them shows."""
    torch.manual_seed(1)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d | FrozenBatchNorm):
            for name in ("weight", "running_var"):
                getattr(norm, name).data.uniform_(0.5, 1.0)
            for name in ("bias", "running_mean"):
                getattr(norm, name).data.normal_(0, 0.1)
    return module.eval()


@pytest.mark.parametrize(
    ("name", "dilation"), [("resnet18", False), ("resnet34", False), ("resnet50", False), ("resnet50", True)]
)
def test_features_equal_torchvisions(name: str, dilation: bool) -> None:
    strides = {"replace_stride_with_dilation": [False, False, dilation]} if dilation else {}
    theirs = with_drawn_statistics(getattr(torchvision.models, name)(weights=None, **strides))
    ours = ResNet(ModelConfig(backbone=name, dilation=dilation))  # type: ignore[arg-type]
    load_backbone_weights(ours, theirs.state_dict())
    images = torch.randn(2, 3, 65, 94)
    with torch.no_grad():
        expected = torchvision.models._utils.IntermediateLayerGetter(theirs, {"layer4": "0"})(images)["0"]
        got = ours(images)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_folding_the_norm_keeps_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    body = with_drawn_statistics(ResNet(ModelConfig(backbone="resnet18"))).double()
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)

    def gradients() -> list[torch.Tensor]:
        body.zero_grad()
        body(images).square().sum().backward()
        return [p.grad.clone() for p in body.parameters() if p.grad is not None]

    folded = gradients()

    def unfolded(conv: nn.Conv2d, norm: FrozenBatchNorm, x: torch.Tensor) -> torch.Tensor:
        scale, shift = norm.scale_and_shift()
        return conv(x) * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)

    monkeypatch.setattr(backbone, "_convolve", unfolded)
    for got, expected in zip(folded, gradients(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


def test_a_frozen_norm_is_folded_once_until_it_changes() -> None:
    body = with_drawn_statistics(ResNet(ModelConfig(backbone="tiny")))
    body.freeze(1)
    norm, images = body.bn1, torch.randn(1, 3, 32, 32)

    def folded(changed: ResNet = body) -> tuple[torch.Tensor, ...]:
        norm = changed.bn1
        weight, bias = norm.fold(changed.conv1.weight)
        scale, shift = norm.scale_and_shift()
        assert torch.equal(weight, changed.conv1.weight * scale[:, None, None, None])
        assert torch.equal(bias, shift)
        return weight, bias

    first = folded()
    assert all(map(operator.is_, folded(), first))
    before = body(images)
    norm.load_state_dict({name: value * 2 for name, value in norm.state_dict().items()})
    assert all(map(operator.is_, folded(), first))  # renewed in the same memory, which a CUDA graph may read
    assert not torch.equal(body(images), before)
    body.conv1.load_state_dict({"weight": body.conv1.weight * 3})
    folded()
    copied = copy.deepcopy(body)
    copied.bn1.bias.add_(1)
    assert not torch.equal(folded(copied)[1], folded()[1])
    assert folded(body.double())[0].dtype == torch.float64
    body.float()
    with torch.inference_mode():  # keeps nothing that training could not use
        body(images)
    body(images).sum().backward()


def test_weights_that_train_are_scaled_in_each_pass_and_only_they() -> None:
    body = with_drawn_statistics(ResNet(ModelConfig(backbone="tiny")))
    body.freeze(1)
    first, second = (
        norm.fold(conv.weight)[0] for conv, norm in ((body.conv1, body.bn1), (body.layer1[0].conv1, body.layer1[0].bn1))
    )
    assert not first.requires_grad
    assert second.requires_grad
    body.bn1.keep_weights = False
    assert body.bn1.fold(body.conv1.weight)[0] is not first


@pytest.mark.parametrize(
    ("stages", "trained"),
    [
        (0, {"conv1", "layer1", "layer2", "layer3", "layer4"}),
        (1, {"layer1", "layer2", "layer3", "layer4"}),
        (2, {"layer2", "layer3", "layer4"}),
        (5, set()),
    ],
)
def test_frozen_stages_do_not_train(stages: int, trained: set[str]) -> None:
    body = Backbone(ModelConfig(backbone="resnet18", frozen_stages=stages)).body
    assert {name.split(".")[0] for name, p in body.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize(
    ("config", "channels", "size"),
    [
        (ModelConfig(backbone="resnet18"), 512, (3, 4)),
        (ModelConfig(backbone="resnet50", dilation=True), 2048, (5, 7)),
        (ModelConfig(backbone="tiny", norm="batch"), 128, (5, 7)),
        (ModelConfig(backbone="tiny", norm="group"), 128, (5, 7)),
    ],
)
def test_sizes_round_up_and_padding_follows_them(config: ModelConfig, channels: int, size: tuple[int, int]) -> None:
    padding = torch.zeros(1, 70, 100, dtype=torch.bool)
    padding[:, :, 50:] = True
    (*_, features), reduced = Backbone(config)(torch.randn(1, 3, 70, 100), padding)
    assert features.shape == (1, channels, *size)
    assert reduced.shape == (1, *size)
    assert reduced[0, 0].tolist() == [column * 100 // size[1] >= 50 for column in range(size[1])]


def test_group_norm_trains_and_keeps_no_statistics() -> None:
    body = ResNet(ModelConfig(backbone="resnet18", norm="group"))
    assert not list(body.buffers())
    assert all(p.requires_grad for p in body.parameters())


def test_weights_of_another_backbone_are_refused() -> None:
    body = ResNet(ModelConfig(backbone="resnet18"))
    before = body.conv1.weight.clone()
    with pytest.raises(ValueError, match=r"backbone weights: got .*expected") as error:
        load_backbone_weights(body, ResNet(ModelConfig(backbone="resnet34")).state_dict())
    assert "\n" not in str(error.value)
    assert torch.equal(body.conv1.weight, before)


def test_a_tiny_backbone_trained_with_batch_norm_loads_into_a_frozen_one() -> None:
    trained = ResNet(ModelConfig(backbone="tiny", norm="batch"))
    images = torch.randn(4, 3, 48, 48)
    trained(images)
    frozen = ResNet(ModelConfig(backbone="tiny"))
    load_backbone_weights(frozen, trained.state_dict())
    torch.testing.assert_close(frozen(images), trained.eval()(images), rtol=1e-4, atol=1e-4)
