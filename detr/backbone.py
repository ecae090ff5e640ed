"""ResNet (He et al., 2016) with the original's parameter names, and its frozen batch norm folded into convolutions."""

from collections import defaultdict
from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detr.config import ModelConfig
from detr.kept import Kept, autocast_type, run_layer

_BLOCKS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
}
_MakeNorm = Callable[[int], nn.Module]


class FrozenBatchNorm(nn.Module):
    """Batch norm whose statistics, scale and shift are constant buffers."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.keep_weights = True
        """Keep the folded weights of a convolution that does not train; under FSDP each rank would hold all of them."""
        self._kept: defaultdict[torch.dtype, Kept] = defaultdict(Kept)
        self._kept_weights: defaultdict[torch.dtype, Kept] = defaultdict(Kept)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Return the two vectors [channels] with `norm(x) = x * scale + shift`."""
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def fold(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight and bias of a convolution that does what one of `weight` and this norm do.

        Scale and shift are computed once, and so is all of it if the weight does not train: the values are bit for bit
        those of a new computation. It saves six kernels of each convolution and forward pass, under bf16 seven.
        """
        if torch.compiler.is_compiling():  # the compiler keeps no results
            scale, shift = self.scale_and_shift()
            return weight * scale[:, None, None, None], shift
        dtype, buffers = autocast_type(weight), tuple(self._buffers.values())

        def vectors() -> tuple[Tensor, Tensor]:
            scale, shift = self.scale_and_shift()
            return scale[:, None, None, None], shift.to(dtype)

        scale, shift = self._kept[dtype].of(buffers, vectors)
        if weight.requires_grad or not self.keep_weights:
            return weight * scale, shift
        (folded,) = self._kept_weights[dtype].of((*buffers, weight), lambda: ((weight * scale).to(dtype),))
        return folded, shift


def _convolve(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """Return norm(conv(x)); frozen batch norm is folded into the convolution's weights.

    The gradients are equal, and no scaled copy of the activations is made. On a CPU, the forward and backward pass of a
    ResNet-50 over 4 images of 640 x 640 takes 7 to 13% less time and 12% less memory.
    """
    if not isinstance(norm, FrozenBatchNorm):
        return norm(conv(x))  # type: ignore[no-any-return]
    return F.conv2d(x, *norm.fold(conv.weight), conv.stride, conv.padding, conv.dilation)


def _conv3x3(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)


class Shortcut(nn.Sequential):
    """Projection of a block's input for blocks that change its size or channels."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: _MakeNorm) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self
        assert isinstance(conv, nn.Conv2d)
        return _convolve(conv, norm, x)


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int, dilation: int, norm: _MakeNorm) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, outputs, stride, dilation)
        self.bn1 = norm(outputs)
        self.conv2 = _conv3x3(outputs, outputs)
        self.bn2 = norm(outputs)
        self.downsample = Shortcut(inputs, outputs, stride, norm) if stride > 1 or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = F.relu(_convolve(self.conv1, self.bn1, x), inplace=True)
        return F.relu(_convolve(self.conv2, self.bn2, x).add_(identity), inplace=True)


class Bottleneck(nn.Module):
    """Residual block of 1x1, 3x3 and 1x1 convolutions; the stride is in the 3x3, as in torchvision."""

    def __init__(self, inputs: int, outputs: int, stride: int, dilation: int, norm: _MakeNorm) -> None:
        super().__init__()
        inner = outputs // 4
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = norm(inner)
        self.conv2 = _conv3x3(inner, inner, stride, dilation)
        self.bn2 = norm(inner)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = norm(outputs)
        self.downsample = Shortcut(inputs, outputs, stride, norm) if stride > 1 or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = F.relu(_convolve(self.conv1, self.bn1, x), inplace=True)
        x = F.relu(_convolve(self.conv2, self.bn2, x), inplace=True)
        return F.relu(_convolve(self.conv3, self.bn3, x).add_(identity), inplace=True)


class ResNet(nn.Module):
    """ResNet without its classifier: float images [B, 3, H, W] to features [B, channels, H / stride, W / stride].

    The stride is 32, or 16 with dilation and for the tiny backbone; sizes round up.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        norm = _norm(config.norm)
        block = Bottleneck if config.backbone in ("resnet50", "resnet101") else BasicBlock
        tiny = config.backbone == "tiny"
        stem = 16 if tiny else 64
        self.conv1 = _conv3x3(3, stem, 2) if tiny else nn.Conv2d(3, stem, 7, 2, padding=3, bias=False)
        self.bn1 = norm(stem)
        self.maxpool = nn.Identity() if tiny else nn.MaxPool2d(3, 2, padding=1)
        self.stages: list[str] = []
        self.recompute = False
        self.channels_last = False
        self.stage_channels: list[int] = []
        inputs, first = stem, 32 if tiny else 256 if block is Bottleneck else 64
        for index, blocks in enumerate((1, 1, 1) if tiny else _BLOCKS[config.backbone]):
            outputs = first * 2**index
            stride, dilation = (2, 1) if tiny or index > 0 else (1, 1)
            if config.dilation and index == 3:
                stride, dilation = 1, 2
            # The first block keeps dilation 1, as in torchvision: the stride it replaces applies only after that block.
            layers = [block(inputs, outputs, stride, 1, norm)]
            layers += [block(outputs, outputs, 1, dilation, norm) for _ in range(blocks - 1)]
            self.add_module(f"layer{index + 1}", nn.Sequential(*layers))
            self.stages.append(f"layer{index + 1}")
            inputs = outputs
            self.stage_channels.append(outputs)
        self.channels = inputs
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        return self._stages(images, every=False)[-1]

    def stage_outputs(self, images: Tensor) -> list[Tensor]:
        """Return the outputs of layer1, layer2, ..., the finest (stride 4) first."""
        return self._stages(images, every=True)

    def _stages(self, images: Tensor, every: bool) -> list[Tensor]:
        # The output of a convolution has the layout of its input, not that of its weights.
        images = images.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)
        x = self.maxpool(F.relu(_convolve(self.conv1, self.bn1, images), inplace=True))
        outputs: list[Tensor] = []
        for name in self.stages:
            if not every:
                outputs.clear()  # frees the earlier outputs, which are the largest
            for block in self.get_submodule(name).children():
                x = run_layer(block, x, recompute=self.recompute)
            outputs.append(x)
        return outputs

    def freeze(self, stages: int) -> None:
        """Freeze the first `stages` of the stem, layer1, layer2, ... and let the others train."""
        prefixes = [("conv1.", "bn1."), *((f"{name}.",) for name in self.stages)]
        frozen = tuple(chain.from_iterable(prefixes[:stages]))
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))


class Backbone(nn.Module):
    """Holder of the ResNet as `body`, the name in the original's keys (`backbone.0.body.*`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.masks = config.masks
        self.body = ResNet(config)
        self.body.freeze(config.frozen_stages)

    def forward(self, images: Tensor, padding: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
        """Return features [B, channels, h, w] and the padding at the size of the last, [B, h, w]; None stays None.

        The list holds the features of every stage, the finest first, if the model has a mask head, else of the last alone.
        """
        stages = self.body.stage_outputs(images) if self.masks else [self.body(images)]
        if padding is not None:
            padding = F.interpolate(padding[:, None].float(), stages[-1].shape[-2:])[:, 0].bool()
        return stages, padding


def _norm(name: str) -> _MakeNorm:
    if name == "frozen_batch":
        return FrozenBatchNorm
    if name == "batch":
        return nn.BatchNorm2d
    return lambda channels: nn.GroupNorm(min(32, channels // 2), channels)
