"""How the arithmetic is done: precision, memory layout, and what is computed twice instead of kept.

None of it changes what a model is or the names of its parameters. With fp32 the results are the same but for the order
of sums; bf16 rounds activations to 8 bits and keeps weights, boxes, costs and losses in fp32.
"""

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import nn

from detr.model import DETR

Precision = Literal["fp32", "bf16"]
Recompute = Literal["none", "encoder", "backbone", "both"]
_CANVAS_SHAPES = 256  # compiled at most; further ones run as they are


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Return the context of the forward pass; the losses are computed outside it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def set_channels_last(model: DETR) -> None:
    """Lay out the backbone's images as [B, height, width, channels], and its convolutions likewise.

    On a CPU this is what oneDNN's kernels are fastest with, and on a GPU what tensor cores take without a transpose.
    """
    model.backbone.to(memory_format=torch.channels_last)
    model.backbone[0].body.channels_last = True  # type: ignore[union-attr]


def set_recompute(model: DETR, parts: Recompute) -> None:
    """Forget the activations inside the encoder's layers or the backbone's blocks, and compute them again backwards."""
    model.transformer.encoder.recompute = parts in ("encoder", "both")
    model.backbone[0].body.recompute = parts in ("backbone", "both")  # type: ignore[union-attr]


def parts(model: DETR) -> list[list[nn.Module]]:
    """Return the groups of modules that are computed one after another and hold most of the weights: the backbone's stages,
    by blocks, and the transformer's layers.
    """
    body = model.backbone[0].body
    stages = [list(body.get_submodule(name).children()) for name in body.stages]  # type: ignore[union-attr]
    layers = [*model.transformer.encoder.layers, *model.transformer.decoder.layers]
    return [*stages, *([layer] for layer in layers)]


def compile_shapes(model: DETR) -> None:
    """Compile the forward and backward pass, once for each canvas shape, when it is met first.

    It happens in place, so the names of parameters stay. Dynamic shapes are off: they make compiling slower than what
    they save. Canvases up to 800 x 1333 rounded to multiples of 64 have about 100 shapes; without rounding, thousands.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _CANVAS_SHAPES)
    model.compile(dynamic=False)


def uncompiled() -> AbstractContextManager[Any]:
    """Return the context in which a compiled model runs as it was written."""
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]
